"""Small text encoders that learn what a large one knows (floor 3).

SD3's encoders come trained; Pocket's are made here. Each is asked for the meaning that a pretrained sentence
encoder sees in the caption (distillation), and for what the picture truly holds: concepts, styles, ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods import Draw, Losses, Turn


@dataclass(frozen=True)
class TextBatch:
    """Captions and what they mean.

    Attributes:
        ids: one entry an encoder, int64 ``[B, L]``.
        meaning: unit vectors of the sentence encoder, ``[B, M]``.
        truth: multi-hot over concepts, styles and grounds, ``[B, K]``.
        known: 1 where the truth is known, else 0, ``[B]``.
    """

    ids: Sequence[Any]
    meaning: Any
    truth: Any
    known: Any


@dataclass(frozen=True)
class Distil:
    """All encoders learn at once, each through heads of its own that are thrown away afterwards.

    Attributes:
        student: a module with ``outputs(ids) -> list of [B, L, D]`` token states and ``[B, P]`` pooled ones,
            and ``heads``: see :class:`fewstep.nets.text.Learner`.
    """

    student: Any

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.losses)]

    def losses(self, batch: TextBatch, draw: Draw) -> Losses:
        """Cosine distance to the meaning, and cross-entropy of the truth, for every view of the caption."""
        import torch.nn.functional as F

        views = self.student(batch.ids)
        meaning = sum(1 - F.cosine_similarity(view.meaning, batch.meaning).mean() for view in views)
        truth = sum(
            (
                F.binary_cross_entropy_with_logits(view.truth, batch.truth, reduction="none").sum(1)
                * batch.known
            ).mean()
            for view in views
        )
        return {"meaning": 4 * meaning / len(views), "truth": truth / len(views)}
