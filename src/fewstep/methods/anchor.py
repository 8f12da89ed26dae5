"""Trajectory guidance beside another loss: the student stays near the teacher's trajectories."""

from __future__ import annotations

from collections.abc import Sequence

from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update
from fewstep.methods.trajectory import trajectory_loss


def anchored(update: Update, velocity: Velocity, grid: Sequence[float], weight: float) -> Update:
    """Return an update whose losses have trajectory guidance besides.

    Args:
        update: of the student.
        velocity: the student.
        grid: its times, descending from 1 to 0.
        weight: of trajectory guidance; 0 returns the update as it is.
    """
    if not weight:
        return update

    def losses(batch: Batch, random: StepRandom) -> Losses:
        guidance = trajectory_loss(velocity, grid, range(len(grid) - 1), batch, random)["trajectory"]
        return {**update.losses(batch, random), "trajectory": weight * guidance}

    return Update(update.net, losses)
