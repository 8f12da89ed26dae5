"""Consistency distillation (Song et al., arXiv 2303.01469; with guidance, LCM, arXiv 2310.04378).

The clean estimates at neighbouring times of the guided teacher's trajectory agree. The estimate nearer to the
data comes from an average of the student's weights, or from the student itself (Song and Dhariwal, arXiv
2310.14189). The student samples by estimating, adding fresh noise (:func:`fewstep.core.sampling.renoise`) and
estimating again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fewstep.core import flow
from fewstep.core.types import Batch, Velocity
from fewstep.methods.anchor import anchored
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

ConsistencyLoss = Literal["pseudo-huber", "l2"]
"""Distances of two estimates. Squares follow outliers, which the pseudo-Huber distance does not."""


@dataclass(frozen=True)
class Target:
    """An exponential average of the student's weights, whose estimates the student learns.

    Attributes:
        net: starts as a copy of the student.
        velocity: the net as a velocity.
        ema: share of its weights that an update keeps.
    """

    net: Module
    velocity: Velocity
    ema: float = 0.95


@dataclass(frozen=True)
class LCM:
    """The student's clean estimate at ``t`` matches the target's, one teacher step nearer to the data.

    Attributes:
        student: the net that is trained.
        velocity: the student as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: the teacher's times, descending from 1 to 0.
        target: the average that makes the target's estimates; ``None`` is the student itself, without
            gradient.
        loss: the distance of the two estimates.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
        student_grid: the student's times, for trajectory guidance.
    """

    student: Module
    velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]
    target: Target | None = None
    loss: ConsistencyLoss = "pseudo-huber"
    trajectory_weight: float = 0.0
    student_grid: Sequence[float] = ()

    @property
    def nets(self) -> dict[str, Module]:
        target = {} if self.target is None else {"target": self.target.net}
        return {"student": self.student, **target}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        follow = [] if self.target is None else [InPlaceUpdate("target", self.move_target)]
        student = Update("student", self.losses)
        return [anchored(student, self.velocity, self.student_grid, self.trajectory_weight), *follow]

    def losses(self, batch: Batch, random: StepRandom) -> Losses:
        """Return the loss; ``batch.latents`` are the teacher's samples."""
        import torch

        x0 = batch.latents
        index = random.choices(range(len(self.grid) - 1), x0)
        grid = torch.tensor(list(self.grid)).to(x0.device)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(x0, random.noise(x0), t)
        velocity = self.velocity if self.target is None else self.target.velocity
        with torch.no_grad():
            step = flow.expand(t_next - t, x)
            x_next = x + step * self.teacher(x, t, batch.cond)
            target = flow.to_x0(x_next, velocity(x_next, t_next, batch.student_cond), t_next)
        error = flow.to_x0(x, self.velocity(x, t, batch.student_cond), t) - target
        return {"consistency": consistency_distance(error, self.loss)}

    def move_target(self, random: StepRandom) -> Sequence[Parameter]:
        """Move the target towards the student, ``phi <- ema phi + (1 - ema) theta``."""
        assert self.target is not None
        pairs = zip(self.target.net.parameters(), self.student.parameters(), strict=True)
        for own, student in pairs:
            own.lerp_(student.to(own.dtype), 1 - self.target.ema)
        return ()


def consistency_distance(error: Tensor, loss: ConsistencyLoss) -> Tensor:
    """Return the mean distance of two estimates ``[B, ...]`` by their difference.

    Args:
        error: the difference.
        loss: mean square, or the pseudo-Huber distance (Song and Dhariwal, arXiv 2310.14189, section 3.3)
            divided by the root of a sample's number of values.
    """
    if loss == "l2":
        return error.square().mean()
    root = error[0].numel() ** 0.5
    c = 0.00054 * root
    return ((error.square().flatten(1).sum(1) + c * c).sqrt() - c).mean() / root
