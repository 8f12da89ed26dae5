"""Captions encoded once: the text encoders need not run while a net trains."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.atomic import replacing_file, sweep
from fewstep.core.progress import stage
from fewstep.core.types import Cond, TextEncoder, UserError
from fewstep.families.common import cuts_counted
from fewstep.train.device import rows_on_device

CHUNK = 250  # captions encoded at once


@dataclass(frozen=True)
class TextCache:
    """Conditions of captions, float16 on disk: ``context [N, L, D]`` and ``pooled [N, P]``."""

    context: np.ndarray[Any, np.dtype[np.float16]]
    pooled: np.ndarray[Any, np.dtype[np.float16]]

    def __len__(self) -> int:
        return len(self.pooled)

    def held(self, device: str) -> Callable[[Sequence[int]], Cond]:
        """Rows -> those captions' condition, float32 on ``device``; a GPU keeps them all."""
        context, pooled = rows_on_device(self.context, device), rows_on_device(self.pooled, device)
        return lambda rows: Cond(context(rows), pooled(rows))


def encode(text: TextEncoder, mark: str, prompts: Sequence[str], folder: Path) -> TextCache:
    """Encode ``prompts`` into ``folder``, or read them there.

    Args:
        text: torch text encoders.
        mark: tells these encoders from all others.
        prompts: the captions, in order.
        folder: where to keep them.

    Raises:
        UserError: a kept file is broken.
    """
    told = hashlib.sha256("\n".join((mark, *prompts)).encode()).hexdigest()[:12]
    paths = [folder / f"{told}-{kind}.npy" for kind in ("context", "pooled")]
    sweep(folder)
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        with stage("encoding captions") as here, cuts_counted(len(prompts), "captions"):
            _encode(text, prompts, paths[0], paths[1], here)
    try:
        context, pooled = (np.load(path, mmap_mode="r") for path in paths)
    except Exception as error:  # a header is read by Python's own parser, which has errors of its own
        raise UserError(f"the captions in {folder} are broken ({error}); delete {told}-* there") from error
    return TextCache(context, pooled)


def _encode(
    text: TextEncoder, prompts: Sequence[str], context: Path, pooled: Path, here: Callable[[int, int], None]
) -> None:
    with replacing_file(context) as one, replacing_file(pooled) as other:
        outs: list[Any] = []
        for start in range(0, len(prompts), CHUNK):
            cond = text(prompts[start : start + CHUNK]).map(lambda a: a.cpu().numpy().astype(np.float16))
            parts = (cond.context, cond.pooled)
            if not outs:
                shapes = [(len(prompts), *part.shape[1:]) for part in parts]
                outs = [
                    np.lib.format.open_memmap(path, "w+", np.float16, shape)
                    for path, shape in zip((one, other), shapes, strict=True)
                ]
            for out, part in zip(outs, parts, strict=True):
                out[start : start + len(part)] = part
            here(start, len(prompts))
            print(f"captions {min(start + CHUNK, len(prompts))}/{len(prompts)}", file=sys.stderr)
        for out in outs:
            out.flush()
