"""Captions of shards, and the facts about their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core import json_io
from fewstep.core.prompt_text import clean, decode_caption
from fewstep.core.types import UserError
from fewstep.data.shards import entries


@dataclass(frozen=True)
class _Object:
    """An object in an image, and its style."""

    concept: str
    style: str


@dataclass(frozen=True)
class _Truth:
    """The keys of a sample's ``.json`` that are checked; other keys are kept as they are."""

    prompt: Any = None
    objects: list[_Object] | None = None
    ground: str | None = None


def _facts(data: bytes, where: str) -> dict[str, Any]:
    facts: dict[str, Any] = json_io.parse(data, where=where, python=True)
    json_io.convert(facts, _Truth, where)
    return {name: value for name, value in facts.items() if value is not None}


def truths_of(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the ``.json`` of every sample, or its caption alone, without decoding images.

    Each has the key ``prompt``.

    Raises:
        UserError: a shard is cut short, empty or no tar, or a caption is missing or no text.
    """
    return chain.from_iterable(map(_truths, shards))


def _truths(shard: Path) -> list[dict[str, Any]]:
    truths: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    for name, data in entries(shard, (".json", ".txt")):
        stem, _, ending = name.rpartition(".")
        where, truth = f"{shard}: {name}", truths.setdefault(stem, {})
        if ending.lower() == "txt":
            captions[stem] = decode_caption(data, where)
        else:
            truth |= _facts(data, where)
    if not truths:
        raise UserError(f"{shard}: no captions (.txt) in it; write it again")
    for stem, truth in truths.items():
        if not isinstance(prompt := captions.get(stem, truth.get("prompt")), str):
            raise UserError(f"{shard}: {stem} has no caption (.txt)")
        truth["prompt"] = clean(prompt)
    return list(truths.values())


def prompts_of(shards: Sequence[Path], count: int, seed: int) -> list[str]:
    """Return ``count`` random captions of the shards; they repeat only when all were taken."""
    lines = [truth["prompt"] for truth in truths_of(shards)]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(lines))
    return [lines[int(order[i % len(lines)])] for i in range(count)]
