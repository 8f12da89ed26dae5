"""Consistency distillation (Song et al., arXiv 2303.01469; with guidance, LCM, arXiv 2310.04378).

The clean estimates at neighbouring times of the guided teacher's trajectory agree. The student samples by
estimating, adding fresh noise (:func:`fewstep.core.sampling.renoise`) and estimating again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.core import flow
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class LCM:
    """The student's clean estimate at ``t`` matches its own estimate one teacher step nearer to the data.

    Attributes:
        student: the net that is trained.
        velocity: the student as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: the teacher's times, descending from 1 to 0.
    """

    student: Module
    velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: Batch, random: StepRandom) -> Losses:
        """Return the loss; ``batch.latents`` are the teacher's samples."""
        import torch

        x0 = batch.latents
        index = random.choices(range(len(self.grid) - 1), x0)
        grid = torch.tensor(list(self.grid)).to(x0.device)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(x0, random.noise(x0), t)
        with torch.no_grad():
            step = flow.expand(t_next - t, x)
            x_next = x + step * self.teacher(x, t, batch.cond)
            target = flow.to_x0(x_next, self.velocity(x_next, t_next, batch.student_cond), t_next)
        error = flow.to_x0(x, self.velocity(x, t, batch.student_cond), t) - target
        # Pseudo-Huber (Song and Dhariwal, arXiv 2310.14189, section 3.3): squares would follow outliers.
        c = 0.00054 * error[0].numel() ** 0.5
        squares = (error * error).flatten(1).sum(1)
        return {"consistency": ((squares + c * c).sqrt() - c).mean() / error[0].numel() ** 0.5}
