"""Captions with their truth, and the words of the language: what text encoders are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core import json_io
from fewstep.core.prompt_text import clean, decode_caption
from fewstep.core.types import UserError
from fewstep.data.shards import entries
from fewstep.pocket.captions import COLOURS
from fewstep.pocket.concepts import Concept
from fewstep.pocket.sources import STYLES

HINTS = {"3d": "3d", "flat": "flat", "noto": "noto", "twemoji": "tw"}
"""Style -> letters that each of its wordings holds, in lower case."""


@dataclass(frozen=True)
class Captions:
    """Texts, and rows of what they ask for: indices into ``labels``; ``None`` where nobody knows."""

    texts: list[str]
    asked: list[list[int] | None]
    labels: list[str]

    def table(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Each text's labels, ``[N, most]``: behind the last one, and where nobody knows, ``len(labels)``."""
        most = max(len(asked or ()) for asked in self.asked)
        table = np.full((len(self.texts), most), len(self.labels))
        for row, asked in zip(table, self.asked, strict=True):
            row[: len(asked or ())] = asked or ()
        return table


def captions(
    shards: Sequence[Path], many: int, concepts: Sequence[Concept], words: Sequence[str]
) -> Captions:
    """``many`` captions of the shards, then every name and synonym alone, then ``words`` of unknown truth."""
    labels = [c.name for c in concepts] + [f"style {s}" for s in STYLES] + [f"ground {c}" for c in COLOURS]
    place = {label: i for i, label in enumerate(labels)}
    texts: list[str] = []
    asked: list[list[int] | None] = []
    for truth in islice(truths_of(shards), many):
        texts.append(truth["prompt"])
        asked.append(_asked(truth, place) if "objects" in truth else None)
    for concept in concepts:
        for name in (concept.name, *concept.synonyms):
            texts.append(name)
            asked.append([place[concept.name]])
    texts += words
    asked += [None] * len(words)
    return Captions(texts, asked, labels)


def _asked(truth: dict[str, Any], place: dict[str, int]) -> list[int]:
    """Concepts always; styles and grounds only where the caption says them (else nobody could know)."""
    said = truth["prompt"].lower()
    objects, ground = truth["objects"], truth.get("ground")
    if ground is None:
        raise UserError("the shards say what is there, but not on which ground: make them again")
    for each in objects:
        if each["concept"] not in place or each["style"] not in HINTS:
            what = f"{each['concept'][:40]!r} of style {each['style'][:40]!r}"
            raise UserError(f"the shards show {what}, of which there is no rendering: make them again")
    found = {place[o["concept"]] for o in objects}
    found |= {place[f"style {o['style']}"] for o in objects if HINTS[o["style"]] in said}
    grounds = ground.removesuffix(" gradient").split(" to ")
    found |= {place[f"ground {g}"] for g in grounds if g in COLOURS and g in said}
    return sorted(found)


@dataclass(frozen=True)
class _Object:
    """A thing in an image, and what it looks like."""

    concept: str
    style: str


@dataclass(frozen=True)
class _Truth:
    """The shape of what we read of a sample's ``.json``; the shards of others have other facts."""

    prompt: Any = None
    objects: list[_Object] | None = None
    ground: str | None = None


def _facts(data: bytes, where: str) -> dict[str, Any]:
    told: dict[str, Any] = json_io.parse(data, where=where, python=True)
    json_io.convert(told, _Truth, where)
    return {name: value for name, value in told.items() if value is not None}


def truths_of(shards: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The ``.json`` entries of the shards, or their captions alone, without decoding a picture.

    Each has a ``prompt``.

    Raises:
        UserError: a shard is cut short, empty or no tar, or a caption is missing or no text.
    """
    return chain.from_iterable(map(_truths, shards))


def _truths(shard: Path) -> list[dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    for name, data in entries(shard, (".json", ".txt")):
        stem, _, ending = name.rpartition(".")
        where, truth = f"{shard}: {name}", out.setdefault(stem, {})
        if ending.lower() == "txt":
            captions[stem] = decode_caption(data, where)
        else:
            truth |= _facts(data, where)
    if not out:
        raise UserError(f"{shard}: no captions (.txt) in it; write it again")
    for stem, truth in out.items():
        if not isinstance(prompt := captions.get(stem, truth.get("prompt")), str):
            raise UserError(f"{shard}: {stem} has no caption (.txt)")
        truth["prompt"] = clean(prompt)
    return list(out.values())


def prompts_of(shards: Sequence[Path], many: int, seed: int) -> list[str]:
    """``many`` captions of the shards by chance, in an order that only ``seed`` decides."""
    lines = [truth["prompt"] for truth in truths_of(shards)]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(lines))
    return [lines[int(order[i % len(lines)])] for i in range(many)]
