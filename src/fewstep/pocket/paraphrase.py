"""Text encoders that understand more, for a net that need not learn anew.

A net was trained on what its encoders say of plain prompts. Whatever else means the same shall make them say
the same: the states that foretell the picture, and the pooled ones, of the plain prompt. States of the single
words cannot agree, for the words differ; they keep, on captions of the data set, what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods.base import Losses, StepRandom, Update


@dataclass(frozen=True)
class PhraseBatch:
    """Token ids int64 ``[B, L]`` of what is said and of what is meant: first phrases, then captions as they
    are.

    Attributes:
        said: ids.
        meant: ids; of a caption its own.
        phrases: how many of the rows are phrases.
    """

    said: Any
    meant: Any
    phrases: int


@dataclass(frozen=True)
class ParaphraseDistillation:
    """Minimise the squared distance to what the encoders said of the plain prompt before, over its variance.

    Attributes:
        learns: the part of ``student`` that learns.
        student: ids ``[B, L]`` -> states ``[B, L, D]`` and pooled ``[B, P]``.
        before: the same of the encoders as they were; it does not learn.
        cells: how many of the last positions foretell the picture.
        heard: states and pooled -> what the net makes of each before its first block, where distance counts.
        kept: weight of captions: little is lost in a picture before it can no longer be told from others.
    """

    learns: Any
    student: Any
    before: Any
    cells: int
    heard: Callable[[Any, Any], tuple[Any, Any]]
    kept: float

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.learns}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: PhraseBatch, draw: StepRandom) -> Losses:
        """Of phrases and of captions."""
        import torch

        with torch.no_grad():
            wanted = self.heard(*self.before(batch.meant))
        own = self.heard(*self.student(batch.said))
        n, c = batch.phrases, self.cells
        return {
            "phrase": _off(own[0][:n, -c:], wanted[0][:n, -c:]) + _off(own[1][:n], wanted[1][:n]),
            "caption": self.kept * (_off(own[0][n:], wanted[0][n:]) + _off(own[1][n:], wanted[1][n:])),
        }


def _off(own: Any, wanted: Any) -> Any:
    return (own - wanted).square().mean() / wanted.var()
