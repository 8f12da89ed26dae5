"""Consistency distillation, a rival (Song et al., arXiv 2303.01469; with guidance, LCM, arXiv 2310.04378).

Two neighbours on the guided teacher's path have one clean estimate. The student draws by estimating, noising
anew (:func:`fewstep.core.sampling.renoise`) and estimating again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.core import flow
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update


@dataclass(frozen=True)
class LCM:
    """The student's clean estimate at ``t`` is what it estimates a small teacher's step nearer to the data.

    Attributes:
        student: the module that learns.
        velocity: the same as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: fine, descending times from 1 to 0: neighbours are a teacher's step apart.
    """

    student: Any
    velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: Batch, draw: StepRandom) -> Losses:
        """``batch.latents`` are the teacher's samples."""
        import torch

        x0 = batch.latents
        index = draw.choices(range(len(self.grid) - 1), x0)
        grid = torch.tensor(list(self.grid)).to(x0.device)
        t, t_next = grid[index], grid[index + 1]
        x = flow.interpolate(x0, draw.noise(x0), t)
        with torch.no_grad():
            step = flow.expand(t_next - t, x)
            nearer = x + step * self.teacher(x, t, batch.cond)
            target = flow.to_x0(nearer, self.velocity(nearer, t_next, batch.student_cond), t_next)
        error = flow.to_x0(x, self.velocity(x, t, batch.student_cond), t) - target
        # Pseudo-Huber (Song and Dhariwal, arXiv 2310.14189, section 3.3): squares would follow outliers.
        c = 0.00054 * error[0].numel() ** 0.5
        size = (error * error).flatten(1).sum(1)
        return {"consistency": ((size + c * c).sqrt() - c).mean() / error[0].numel() ** 0.5}
