"""Small text encoders that learn what a large one knows.

SD3's encoders come trained; Pocket's are made here. Each is asked for the meaning that a pretrained sentence
encoder sees in the caption (distillation), and for what the picture truly holds: concepts, styles, ground.
The CLIPs together foretell the picture besides. Their best guess is the mean of all pictures of that caption:
just what a flow needs to know for its step out of pure noise, where v = eps - E[x_0 | caption].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods.base import Losses, StepRandom, Update

PICTURE = 10.0
"""Weight of the cells' squared error."""


@dataclass(frozen=True)
class TextBatch:
    """Captions and what they mean.

    Attributes:
        ids: one entry an encoder, int64 ``[B, L]``; an encoder that learns less gets the first rows only.
        meaning: unit vectors of the sentence encoder, ``[B, M]``.
        truth: multi-hot over concepts, styles and grounds, ``[B, K]``.
        known: 1 where the truth is known, else 0, ``[B]``.
        picture: the picture's latents, cut into cells, ``[B, N, V]``.
        drawn: 1 where there is a picture, else 0, ``[B]``.
    """

    ids: Sequence[Any]
    meaning: Any
    truth: Any
    known: Any
    picture: Any
    drawn: Any


@dataclass(frozen=True)
class TextEncoderDistillation:
    """All encoders learn at once, each through heads of its own that are thrown away afterwards.

    Attributes:
        student: a module that maps ``ids`` to views and cells
            (:class:`fewstep.pocket.text_encoder.TextEncodersWithHeads`).
    """

    student: Any

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: TextBatch, draw: StepRandom) -> Losses:
        """For every view the cosine distance to the meaning and the cross-entropy of the truth; for the cells
        the squared error. The weights bring the three to one size at the start."""
        import torch.nn.functional as F

        views, cells = self.student(batch.ids)
        meaning: Any = 0.0
        truth: Any = 0.0
        for view in views:
            n = len(view.meaning)
            meaning += 1 - F.cosine_similarity(view.meaning, batch.meaning[:n]).mean()
            wrong = F.binary_cross_entropy_with_logits(view.truth, batch.truth[:n], reduction="none").sum(1)
            truth += (wrong * batch.known[:n]).mean()
        off = ((cells - batch.picture) ** 2).mean((1, 2))
        picture = (off * batch.drawn).sum() / batch.drawn.sum().clamp(min=1)
        return {
            "meaning": 4 * meaning / len(views),
            "truth": truth / len(views),
            "picture": PICTURE * picture,
        }
