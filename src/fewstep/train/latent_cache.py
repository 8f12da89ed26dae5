"""Latents of shards, encoded once before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.core.atomic import replacing_file, sweep
from fewstep.core.progress import say, stage
from fewstep.core.prompt_text import clean
from fewstep.core.types import Model, UserError
from fewstep.data import sampler, shards
from fewstep.train.device import use_bf16

BATCH = 50  # images per call of the encoder
READERS = 8  # shards decoded at once beside a GPU, which would wait for images


@dataclass(frozen=True)
class Latents:
    """All latents of a data set, float16 ``[N, C, H, W]``, and their captions."""

    values: NDArray[np.float16]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, step: int, batch: int, seed: int) -> list[int]:
        """Return the rows of training step ``step``: every row once per epoch, in a new order each time."""
        return sampler.batch_indices(len(self), step, batch, seed)


def encode(model: Model, weights: Path, sources: Sequence[Path], folder: Path, size: int) -> Latents:
    """Encode every shard into ``folder``, one file per shard, and read all of them.

    Args:
        model: its codec encodes.
        weights: file of the codec's weights; its hash names the subfolder, so that each codec has its own.
        sources: the shards.
        folder: of the cache.
        size: side of the images, pixels.

    Raises:
        UserError: a shard or a cached file is broken.
    """
    cache = folder / hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    sweep(cache)
    device = model.from_numpy(np.zeros(1, np.float32)).device.type
    suffix = "-bf16" if use_bf16("auto", device) else ""  # rounding differs, so each precision has its files
    paths = [cache / f"{shard.stem}-{size}-{_hash(shard)}{suffix}.npz" for shard in sources]
    missing = [(shard, path) for shard, path in zip(sources, paths, strict=True) if not path.exists()]
    with (
        stage("encoding images") as progress,
        ThreadPoolExecutor(READERS if device == "cuda" else 1) as pool,
    ):
        done = pool.map(partial(_encode_shard, model, size, device), missing)
        for number, _ in enumerate(done, 1):
            progress(number, len(missing))
            say(f"latents {number}/{len(missing)}")
    values: list[NDArray[np.float16]] = []
    prompts: list[str] = []
    for path in paths:
        try:
            with np.load(path) as arrays:
                values.append(arrays["latents"])
                prompts += [clean(str(p)) for p in arrays["prompts"]]
        except Exception as error:  # NumPy reads the header with Python's parser, which raises many errors
            raise UserError(f"{path} is broken ({error}); delete it and run again") from error
    return Latents(np.concatenate(values), prompts)


def _hash(shard: Path) -> str:
    """Return a hash of a shard's content."""
    with shard.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _encode_shard(model: Model, size: int, device: str, job: tuple[Path, Path]) -> None:
    """Encode a shard into a file."""
    import torch

    shard, path = job
    parts: list[NDArray[np.float16]] = []
    prompts: list[str] = []
    with torch.no_grad():
        for images, captions in _batches(shard, size):
            pixels = model.from_numpy(images.astype(np.float32) / 127.5 - 1)
            with torch.autocast(device, torch.bfloat16, enabled=use_bf16("auto", device)):
                parts.append(model.to_numpy(model.codec.encode(pixels)).astype(np.float16))
            prompts += captions
    with replacing_file(path) as fresh:
        np.savez(fresh, latents=np.concatenate(parts), prompts=np.array(prompts))


def _batches(shard: Path, size: int) -> Iterator[tuple[NDArray[np.uint8], list[str]]]:
    images: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for image, caption in shards.pixels([shard], size):
        images.append(image)
        captions.append(caption)
        if len(images) == BATCH:
            yield np.stack(images), captions
            images, captions = [], []
    if images:
        yield np.stack(images), captions
