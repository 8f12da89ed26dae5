"""Captions with their truth, and the words of the language: what text encoders are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import UserError
from fewstep.data.captions import truths_of
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
