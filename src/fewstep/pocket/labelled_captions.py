"""Captions with labels of what they ask for: the training texts of Pocket's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core.types import UserError
from fewstep.data.captions import truths_of
from fewstep.pocket.captions import COLOURS
from fewstep.pocket.concepts import Concept
from fewstep.pocket.sources import STYLES

STYLE_SUBSTRINGS = {"3d": "3d", "flat": "flat", "noto": "noto", "twemoji": "tw"}
"""Style -> a substring of each of its phrases, in lower case."""


@dataclass(frozen=True)
class LabelledCaptions:
    """Captions and their labels.

    Attributes:
        texts: the captions.
        label_ids: for each caption the indices of its labels into ``label_names``; ``None`` if unknown.
        label_names: the names of all concepts, styles and background colours.
    """

    texts: list[str]
    label_ids: list[list[int] | None]
    label_names: list[str]

    def label_table(self) -> NDArray[np.int64]:
        """Return the label indices of each text, ``[N, most]``, padded with ``len(label_names)``."""
        most = max(len(ids or ()) for ids in self.label_ids)
        table = np.full((len(self.texts), most), len(self.label_names))
        for row, ids in zip(table, self.label_ids, strict=True):
            row[: len(ids or ())] = ids or ()
        return table


def load(
    shards: Sequence[Path], count: int, concepts: Sequence[Concept], words: Sequence[str]
) -> LabelledCaptions:
    """Return captions of the shards, then every concept's name and synonyms, then ``words`` without labels.

    Args:
        shards: Shards of the stickers data set.
        count: Number of captions to read from them.
        concepts: The concepts of the renderings.
        words: Words whose labels are unknown.

    Raises:
        UserError: A shard is broken, or its ground truth does not match ``concepts``.
    """
    label_names = (
        [c.name for c in concepts] + [f"style {s}" for s in STYLES] + [f"ground {c}" for c in COLOURS]
    )
    label_index = {label: i for i, label in enumerate(label_names)}
    texts: list[str] = []
    label_ids: list[list[int] | None] = []
    for truth in islice(truths_of(shards), count):
        texts.append(truth["prompt"])
        label_ids.append(_labels_in_caption(truth, label_index) if "objects" in truth else None)
    for concept in concepts:
        for name in (concept.name, *concept.synonyms):
            texts.append(name)
            label_ids.append([label_index[concept.name]])
    texts += words
    label_ids += [None] * len(words)
    return LabelledCaptions(texts, label_ids, label_names)


def _labels_in_caption(truth: dict[str, Any], label_index: dict[str, int]) -> list[int]:
    """Return the labels of a sample's concepts, and of the styles and backgrounds that its caption names."""
    caption = truth["prompt"].lower()
    objects, background = truth["objects"], truth.get("ground")
    if background is None:
        raise UserError("the shards say what is there, but not on which ground: make them again")
    for placed in objects:
        if placed["concept"] not in label_index or placed["style"] not in STYLE_SUBSTRINGS:
            pair = f"{placed['concept'][:40]!r} of style {placed['style'][:40]!r}"
            raise UserError(f"the shards show {pair}, of which there is no rendering: make them again")
    labels = {label_index[placed["concept"]] for placed in objects}
    labels |= {
        label_index[f"style {placed['style']}"]
        for placed in objects
        if STYLE_SUBSTRINGS[placed["style"]] in caption
    }
    colours = background.removesuffix(" gradient").split(" to ")
    labels |= {label_index[f"ground {c}"] for c in colours if c in COLOURS and c in caption}
    return sorted(labels)
