"""Trajectory guidance: one step of the student regresses many steps of the guided teacher.

SD3.5-Flash (arXiv 2509.21318), the warm start:
``|| v(x_i, t_i) - (x_{i+1} - x_i) / (t_{i+1} - t_i) ||^2`` where ``x_i`` and ``x_{i+1}`` are states of the
teacher's trajectory at neighbouring times of the student's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.core import losses
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch.nn import Module


def trajectory_loss(
    velocity: Velocity, grid: Sequence[float], steps: Sequence[int], batch: Batch, random: StepRandom
) -> Losses:
    """Return the loss of ``velocity`` on one random step of each of the teacher's trajectories.

    Args:
        velocity: the student.
        grid: its times, descending from 1 to 0.
        steps: indices of the steps of the grid that are drawn from.
        batch: ``batch.trajectory`` ``[B, S + 1, C, H, W]`` are the trajectories at the times of ``grid``.
        random: of this update.

    Raises:
        ValueError: the batch carries no trajectories on this grid.
    """
    import torch

    states = batch.trajectory
    if states is None or states.shape[1] != len(grid):
        raise ValueError(f"trajectory guidance needs the teacher's trajectories at {len(grid)} times")
    rows, index = torch.arange(len(states)), random.choices(steps, batch.latents).cpu()
    t = torch.tensor(list(grid)).to(states.device)
    start, end = states[rows, index], states[rows, index + 1]
    v = velocity(start, t[index], batch.student_cond)
    return {"trajectory": losses.trajectory(v, start, end, t[index], t[index + 1])}


@dataclass(frozen=True)
class Trajectory:
    """The student regresses the steps of the teacher's trajectories.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        grid: its times, descending from 1 to 0.
    """

    student: Module
    velocity: Velocity
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: Batch, random: StepRandom) -> Losses:
        return trajectory_loss(self.velocity, self.grid, range(len(self.grid) - 1), batch, random)
