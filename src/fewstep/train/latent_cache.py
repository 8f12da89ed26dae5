"""Latents of shards, computed once: the autoencoder need not run while a net trains."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.atomic import replacing_file, sweep
from fewstep.core.progress import stage
from fewstep.core.prompt_text import clean
from fewstep.core.types import Model, UserError
from fewstep.data import sampler, shards
from fewstep.train.device import use_bf16

CHUNK = 50  # pictures encoded at once
READERS = 8  # shards decoded at once beside a GPU, which waits for pictures


@dataclass(frozen=True)
class Latents:
    """All latents of a data set: float16 ``[N, C, H, W]``, and their captions."""

    values: np.ndarray[Any, np.dtype[np.float16]]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, step: int, batch: int, seed: int) -> list[int]:
        """Which rows step ``step`` sees: every row once an epoch, in a new order each time."""
        return sampler.batch_indices(len(self), step, batch, seed)


def encode(model: Model, weights: Path, sources: Sequence[Path], folder: Path, size: int) -> Latents:
    """Encode every shard into ``folder`` (kept there, one file a shard) and read them all.

    Args:
        model: its codec encodes.
        weights: the codec's weights' file. Its hash names the folder, so no other codec reads it.
        sources: the shards.
        folder: where to keep them.
        size: side of the pictures, pixels.

    Raises:
        UserError: a shard is broken, or a kept file is.
    """
    kept = folder / hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    kept.mkdir(parents=True, exist_ok=True)
    sweep(kept)
    place = model.from_numpy(np.zeros(1, np.float32)).device.type
    mark = "-bf16" if use_bf16("auto", place) else ""  # rounding differs: one set, one precision
    paths = [kept / f"{shard.stem}-{size}-{_told(shard)}{mark}.npz" for shard in sources]
    fresh = [(shard, path) for shard, path in zip(sources, paths, strict=True) if not path.exists()]
    with (
        stage("encoding images") as here,
        ThreadPoolExecutor(READERS if place == "cuda" else 1) as pool,
    ):
        made = pool.map(partial(_encode_one, model, size, place), fresh)
        for number, _ in enumerate(made):
            here(number + 1, len(fresh))
            print(f"latents {number + 1}/{len(fresh)}", file=sys.stderr)
    values: list[Any] = []
    prompts: list[str] = []
    for path in paths:
        try:
            with np.load(path) as read:
                values.append(read["latents"])
                prompts += [clean(str(p)) for p in read["prompts"]]
        except Exception as error:  # a header is read by Python's own parser, which has errors of its own
            raise UserError(f"{path} is broken ({error}); delete it and run again") from error
    return Latents(np.concatenate(values), prompts)


def _told(shard: Path) -> str:
    """What tells a shard's content from another's."""
    with shard.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _encode_one(model: Model, size: int, place: str, job: tuple[Path, Path]) -> None:
    """A shard into a file."""
    import torch

    shard, path = job
    parts: list[Any] = []
    prompts: list[str] = []
    with torch.no_grad():
        for images, lines in _chunks(shard, size):
            pixels = model.from_numpy(images.astype(np.float32) / 127.5 - 1)
            with torch.autocast(place, torch.bfloat16, enabled=use_bf16("auto", place)):
                parts.append(model.to_numpy(model.codec.encode(pixels)).astype(np.float16))
            prompts += lines
    with replacing_file(path) as fresh:
        np.savez(fresh, latents=np.concatenate(parts), prompts=np.array(prompts))


def _chunks(shard: Path, size: int) -> Iterator[tuple[np.ndarray[Any, Any], list[str]]]:
    images: list[Any] = []
    lines: list[str] = []
    for picture, prompt in shards.pixels([shard], size):
        images.append(picture)
        lines.append(prompt)
        if len(images) == CHUNK:
            yield np.stack(images), lines
            images, lines = [], []
    if images:
        yield np.stack(images), lines
