"""Distillation of Pocket's text encoders on paraphrases, such that the trained MMDiT stays valid.

The MMDiT was trained on the encoders' outputs for plain prompts. The student encoders learn to return those
outputs for paraphrases of the plain prompts, too. The outputs are the pooled states, and the states of the
last positions, which predict the image. States of single words cannot agree, since the words differ. On
captions of the data set all states are kept as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ParaphraseBatch:
    """Paraphrases and captions, as token ids int64 ``[B, L]``; the paraphrases come first.

    Attributes:
        prompt_ids: ids that the student encodes.
        target_ids: ids that the teacher encodes: the paraphrases' plain prompts, and the captions themselves.
        num_paraphrases: number of rows that are paraphrases.
    """

    prompt_ids: torch.Tensor
    target_ids: torch.Tensor
    num_paraphrases: int


@dataclass(frozen=True)
class ParaphraseDistillation:
    """Minimise the squared distance between the student's and the teacher's states, over their variance.

    Attributes:
        trainable: the part of ``student`` that is trained.
        student: ids ``[B, L]`` -> states ``[B, L, D]`` and pooled states ``[B, P]``.
        teacher: the same of the encoders before training; frozen.
        num_cells: number of the last positions, which predict the image.
        project: states and pooled states -> the MMDiT's projections of them, between which distances are
            measured.
        caption_weight: weight of the captions' loss.
    """

    trainable: nn.Module
    student: nn.Module
    teacher: nn.Module
    num_cells: int
    project: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    caption_weight: float

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {"student": self.trainable}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: ParaphraseBatch, draw: StepRandom) -> Losses:
        """Return the losses of the paraphrases and of the captions."""
        import torch

        with torch.no_grad():
            target_states, target_pooled = self.project(*self.teacher(batch.target_ids))
        states, pooled = self.project(*self.student(batch.prompt_ids))
        n, c = batch.num_paraphrases, self.num_cells
        return {
            "phrase": _relative_error(states[:n, -c:], target_states[:n, -c:])
            + _relative_error(pooled[:n], target_pooled[:n]),
            "caption": self.caption_weight
            * (
                _relative_error(states[n:], target_states[n:])
                + _relative_error(pooled[n:], target_pooled[n:])
            ),
        }


def _relative_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over the target's variance."""
    return (states - target).square().mean() / target.var()
