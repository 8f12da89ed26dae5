"""Pictures of candidates and features of pictures, made in chunks that are kept as they come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate.array_cache import Arrays, Cache
from fewstep.evaluate.candidates import Candidate, Plan
from fewstep.evaluate.features import Extractor
from fewstep.pocket.stickers import Reference

CHUNK = 32
"""Pictures made, measured and kept at a time: what an interruption can cost."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many pictures are done, and of how many."""


def silent(_label: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class Pictures:
    """Pictures uint8 ``[N, 3, h, w]`` and their features ``[N, d]``."""

    images: NDArray[np.uint8]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class ImageCache:
    """Makes what an evaluation measures, or takes it from the cache.

    Chunks have fixed borders, so that an interrupted run and a whole one compute the very same thing.
    """

    extractor: Extractor
    cache: Cache
    shared: Cache
    """For the features of real renderings, which several runs may share."""
    progress: Progress

    def generated(self, candidate: Candidate, plan: Plan) -> Pictures:
        """All pictures of a candidate, in the order of `Plan.rows`."""
        return self.images(candidate, *plan.rows(), candidate.label)

    def images(
        self, candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int], name: str
    ) -> Pictures:
        """Pictures of a candidate and their features, one of each prompt and seed; ``name`` is shown."""

        def part(at: int, to: int) -> Arrays:
            origin = [candidate.identity, self.extractor.name, prompts[at:to], seeds[at:to]]
            return self.cache.get(slug(candidate.label), origin, lambda: make(at, to))

        def make(at: int, to: int) -> Arrays:
            images = _checked(candidate, prompts[at:to], seeds[at:to])
            return {"images": images, "features": self.extractor(images)}

        parts = self._chunks(name, len(prompts), part)
        return Pictures(*(np.concatenate([part[key] for part in parts]) for key in ("images", "features")))

    def generate(
        self, candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int], name: str
    ) -> NDArray[np.uint8]:
        """Pictures of a candidate that need no features, uint8 ``[N, 3, h, w]``; ``name`` is shown."""

        def part(at: int, to: int) -> Arrays:
            origin = [candidate.identity, prompts[at:to], seeds[at:to]]
            return self.cache.get(slug(candidate.label), origin, lambda: make(at, to))

        def make(at: int, to: int) -> Arrays:
            return {"images": _checked(candidate, prompts[at:to], seeds[at:to])}

        return np.concatenate([part["images"] for part in self._chunks(name, len(prompts), part)])

    def real(self, references: Sequence[Reference], name: str) -> NDArray[np.float32]:
        """Features of renderings, ``[M, d]``."""

        def part(at: int, to: int) -> Arrays:
            images = np.stack([reference.image for reference in references[at:to]])
            origin = [self.extractor.name, list(images.shape), hashlib.sha256(images.tobytes()).hexdigest()]
            return self.shared.get(slug(name), origin, lambda: {"features": self.extractor(images)})

        return np.concatenate([part["features"] for part in self._chunks(name, len(references), part)])

    def _chunks(self, label: str, total: int, part: Callable[[int, int], Arrays]) -> list[Arrays]:
        parts: list[Arrays] = []
        for at in range(0, total, CHUNK):
            self.progress(label, at, total)
            parts.append(part(at, min(at + CHUNK, total)))
        self.progress(label, total, total)
        return parts


def _checked(candidate: Candidate, prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
    images = candidate.draw(prompts, seeds)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{candidate.label} drew {got} for {len(prompts)} prompts")
    return images


def slug(label: str) -> str:
    """A label as a file name."""
    return re.sub(r"[^A-Za-z0-9.@]+", "-", label).strip("-.") or "model"
