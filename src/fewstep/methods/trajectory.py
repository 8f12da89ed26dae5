"""Trajectory guidance: one step of the student does what many steps of the guided teacher do.

SD3.5-Flash (arXiv 2509.21318), the warm start:
``|| v(x_i, t_i) - (x_{i+1} - x_i) / (t_{i+1} - t_i) ||^2`` where ``x_i`` and ``x_{i+1}`` are states of the
teacher's own walk at two neighbours of the student's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.core import losses
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update


def trajectory_loss(
    velocity: Velocity, grid: Sequence[float], steps: Sequence[int], batch: Batch, draw: StepRandom
) -> Losses:
    """The loss of ``velocity`` on a move of each of the teacher's walks, drawn among ``steps`` of the grid.

    ``batch.states`` ``[B, S + 1, C, H, W]`` are the walks at the times of ``grid``.

    Raises:
        ValueError: the batch carries no walks on this grid.
    """
    import torch

    states = batch.trajectory
    if states is None or states.shape[1] != len(grid):
        raise ValueError(f"trajectory guidance needs the teacher's walks at {len(grid)} times")
    rows, moves = torch.arange(len(states)), draw.choices(steps, batch.latents).cpu()
    start, end, t = states[rows, moves], states[rows, moves + 1], torch.tensor(list(grid)).to(states.device)
    v = velocity(start, t[moves], batch.student_cond)
    return {"trajectory": losses.trajectory(v, start, end, t[moves], t[moves + 1])}


@dataclass(frozen=True)
class Trajectory:
    """The student regresses the teacher's moves.

    Attributes:
        student: the module that learns, a few-step net.
        velocity: the same as a velocity.
        grid: its times, descending from 1 to 0.
    """

    student: Any
    velocity: Velocity
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: Batch, draw: StepRandom) -> Losses:
        return trajectory_loss(self.velocity, self.grid, range(len(self.grid) - 1), batch, draw)
