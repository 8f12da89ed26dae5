"""Consistency distillation (Song et al., arXiv 2303.01469; with guidance, LCM, arXiv 2310.04378).

The clean estimates at neighbouring times of the guided teacher's trajectory agree. The student samples by
estimating, adding fresh noise (:func:`fewstep.core.sampling.renoise`) and estimating again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core import flow
from fewstep.core.types import Batch, Velocity
from fewstep.methods.anchor import anchored
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter


def follow(target: Module, student: Module, decay: float, random: StepRandom) -> Sequence[Parameter]:
    """Move the target net towards the student, ``theta' <- decay theta' + (1 - decay) theta``."""
    for own, new in zip(target.parameters(), student.parameters(), strict=True):
        own.lerp_(new.to(own.dtype), 1 - decay)
    return ()


def pseudo_huber(error: Tensor) -> Tensor:
    """Return ``sqrt(|e|^2 + c^2) - c`` with ``c = 0.00054 sqrt(d)``, over ``sqrt(d)``, its mean over samples.

    Song and Dhariwal (arXiv 2310.14189, section 3.3). Squares would follow outliers.

    Args:
        error: ``[B, ...]``; a sample has ``d`` values.
    """
    root = error[0].numel() ** 0.5
    c = 0.00054 * root
    squares = (error * error).flatten(1).sum(1)
    return ((squares + c * c).sqrt() - c).mean() / root


@dataclass(frozen=True)
class LCM:
    """The student's clean estimate at ``t`` matches the target's one teacher step nearer to the data.

    Attributes:
        student: the net that is trained.
        velocity: the student as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: the teacher's times, descending from 1 to 0.
        target: a copy of the student that follows it (:func:`follow`); ``None`` takes the student itself.
        target_velocity: the target as a velocity.
        target_decay: decay of the target.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
        student_grid: the student's times, for trajectory guidance.
    """

    student: Module
    velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]
    target: Module | None = None
    target_velocity: Velocity | None = None
    target_decay: float = 0.95
    trajectory_weight: float = 0.0
    student_grid: Sequence[float] = ()

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student} | ({} if self.target is None else {"target": self.target})

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        update = Update("student", self.losses)
        updates: list[Update | InPlaceUpdate] = [
            anchored(update, self.velocity, self.student_grid, self.trajectory_weight)
        ]
        if self.target is not None:
            updates.append(
                InPlaceUpdate("target", partial(follow, self.target, self.student, self.target_decay))
            )
        return updates

    def losses(self, batch: Batch, random: StepRandom) -> Losses:
        """Return the loss; ``batch.latents`` are the teacher's samples."""
        import torch

        x0 = batch.latents
        index = random.choices(range(len(self.grid) - 1), x0)
        grid = torch.tensor(list(self.grid)).to(x0.device)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(x0, random.noise(x0), t)
        aim = self.target_velocity or self.velocity
        with torch.no_grad():
            x_next = x + flow.expand(t_next - t, x) * self.teacher(x, t, batch.cond)
            target = flow.to_x0(x_next, aim(x_next, t_next, batch.student_cond), t_next)
        estimate = flow.to_x0(x, self.velocity(x, t, batch.student_cond), t)
        return {"consistency": pseudo_huber(estimate - target)}
