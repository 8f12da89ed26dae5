"""Conditions of captions, encoded once before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.core.atomic import replacing_file, sweep
from fewstep.core.progress import say, stage
from fewstep.core.types import Cond, TextEncoder, UserError
from fewstep.families.common import cuts_counted
from fewstep.train.device import rows_on_device

BATCH = 250  # captions per call of the text encoders


@dataclass(frozen=True)
class TextCache:
    """Conditions of captions, float16 memory maps: ``context [N, L, D]`` and ``pooled [N, P]``."""

    context: NDArray[np.float16]
    pooled: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.pooled)

    def on_device(self, device: str) -> Callable[[Sequence[int]], Cond]:
        """Return a function from rows to their condition, float32 on ``device``; a GPU stores all of them."""
        context, pooled = rows_on_device(self.context, device), rows_on_device(self.pooled, device)
        return lambda rows: Cond(context(rows), pooled(rows))


def encode(text: TextEncoder, mark: str, prompts: Sequence[str], folder: Path) -> TextCache:
    """Encode ``prompts`` into ``folder``, or read them from there.

    Args:
        text: torch text encoders.
        mark: fingerprint of the text encoders.
        prompts: the captions, in order.
        folder: of the cache.

    Raises:
        UserError: a cached file is broken.
    """
    name = hashlib.sha256("\n".join((mark, *prompts)).encode()).hexdigest()[:12]
    paths = [folder / f"{name}-{kind}.npy" for kind in ("context", "pooled")]
    sweep(folder)
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with stage("encoding captions") as progress, cuts_counted(len(prompts), "captions"):
            _encode(text, prompts, paths[0], paths[1], progress)
    try:
        context, pooled = (np.load(path, mmap_mode="r") for path in paths)
    except Exception as error:  # NumPy reads the header with Python's parser, which raises many errors
        raise UserError(f"the captions in {folder} are broken ({error}); delete {name}-* there") from error
    return TextCache(context, pooled)


def _encode(
    text: TextEncoder,
    prompts: Sequence[str],
    context: Path,
    pooled: Path,
    progress: Callable[[int, int], None],
) -> None:
    with replacing_file(context) as context_file, replacing_file(pooled) as pooled_file:
        arrays: list[np.memmap] = []
        for start in range(0, len(prompts), BATCH):
            cond = text(prompts[start : start + BATCH]).map(lambda a: a.cpu().numpy().astype(np.float16))
            parts = (cond.context, cond.pooled)
            if not arrays:
                shapes = [(len(prompts), *part.shape[1:]) for part in parts]
                arrays = [
                    np.lib.format.open_memmap(path, "w+", np.float16, shape)
                    for path, shape in zip((context_file, pooled_file), shapes, strict=True)
                ]
            for array, part in zip(arrays, parts, strict=True):
                array[start : start + len(part)] = part
            progress(start, len(prompts))
            say(f"captions {min(start + BATCH, len(prompts))}/{len(prompts)}")
        for array in arrays:
            array.flush()
