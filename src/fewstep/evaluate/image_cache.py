"""Images of candidates and features of images, computed and cached in chunks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate.array_cache import Arrays, Cache
from fewstep.evaluate.candidates import Candidate
from fewstep.evaluate.features import Extractor
from fewstep.evaluate.metric import ImageBatch

CHUNK = 32
"""Images per chunk: the most that an interruption can lose."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number of images done, and their total number."""


def silent(_label: str, _done: int, _total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class ImageCache:
    """Computes images and features, or takes them from the cache.

    Chunks have fixed borders, so that an interrupted run computes the same as a whole one.

    Attributes:
        extractor: computes features; ``None`` where no metric needs them.
        cache: for images, and for the features of generated images.
        shared: for the features of real images, which several runs may share.
        progress: called before each chunk.
    """

    extractor: Extractor | None
    cache: Cache
    shared: Cache
    progress: Progress

    def generated(
        self, candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int], name: str, *, features: bool
    ) -> ImageBatch:
        """Return a candidate's images, one per prompt and seed.

        Args:
            candidate: the model.
            prompts: ``[N]``.
            seeds: ``[N]``.
            name: of the work, for progress.
            features: whether to compute features.
        """
        extractor = self._extractor() if features else None

        def part(start: int, end: int) -> Arrays:
            extracted = [extractor.name] if extractor else []
            origin = [candidate.identity, *extracted, prompts[start:end], seeds[start:end]]
            return self.cache.get(slug(candidate.label), origin, lambda: generate(start, end))

        def generate(start: int, end: int) -> Arrays:
            images = _checked(candidate, prompts[start:end], seeds[start:end])
            return {"images": images, **({"features": extractor(images)} if extractor else {})}

        parts = self._chunks(name, len(prompts), part)
        images = np.concatenate([part["images"] for part in parts])
        if not features:
            return without_features(images)
        return ImageBatch(images, np.concatenate([part["features"] for part in parts]))

    def real(self, images: Sequence[NDArray[np.uint8]], name: str) -> NDArray[np.float32]:
        """Return the features ``[M, d]`` of real images ``[3, h, w]`` of one size; cached by ``name``."""
        extractor = self._extractor()

        def part(start: int, end: int) -> Arrays:
            chunk = np.stack(images[start:end])
            origin = [extractor.name, list(chunk.shape), hashlib.sha256(chunk.tobytes()).hexdigest()]
            return self.shared.get(slug(name), origin, lambda: {"features": extractor(chunk)})

        return np.concatenate([part["features"] for part in self._chunks(name, len(images), part)])

    def _extractor(self) -> Extractor:
        if self.extractor is None:
            raise ValueError("this cache was made without a feature extractor")
        return self.extractor

    def _chunks(self, label: str, total: int, part: Callable[[int, int], Arrays]) -> list[Arrays]:
        parts: list[Arrays] = []
        for start in range(0, total, CHUNK):
            self.progress(label, start, total)
            parts.append(part(start, min(start + CHUNK, total)))
        self.progress(label, total, total)
        return parts


def without_features(pixels: NDArray[np.uint8]) -> ImageBatch:
    """Return images uint8 ``[N, 3, h, w]`` as a batch whose features are ``[N, 0]``."""
    return ImageBatch(pixels, np.zeros((len(pixels), 0), np.float32))


def _checked(candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
    images = candidate.draw(prompts, seeds)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{candidate.label} drew {got} for {len(prompts)} prompts")
    return images


def slug(label: str) -> str:
    """Return a label as a file name."""
    return re.sub(r"[^A-Za-z0-9.@]+", "-", label).strip("-.") or "model"
