"""Trajectory guidance: one step of the student does what many steps of the guided teacher do (floor 3).

SD3.5-Flash (arXiv 2509.21318), the warm start:
``|| v(x_i, t_i) - (x_{i+1} - x_i) / (t_{i+1} - t_i) ||^2`` where ``x_i`` and ``x_{i+1}`` are states of the
teacher's own walk at two neighbours of the student's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep import losses
from fewstep.methods import Draw, Losses, Turn
from fewstep.types import Cond, Velocity


@dataclass(frozen=True)
class Walks:
    """Some moves of the teacher.

    Attributes:
        start: states at the start times, ``[B, C, H, W]``.
        end: states at the end times.
        t: start times, ``[B]``.
        t_next: end times, ``[B]``.
        cond: conditions of the ``B`` moves.
    """

    start: Any
    end: Any
    t: Any
    t_next: Any
    cond: Cond


@dataclass(frozen=True)
class Trajectory:
    """The student regresses the teacher's moves.

    Attributes:
        net: the student's torch module.
        velocity: the same net as a velocity.
    """

    net: Any
    velocity: Velocity

    @property
    def nets(self) -> dict[str, Any]:
        return {"net": self.net}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("net", self.losses)]

    def losses(self, batch: Walks, draw: Draw) -> Losses:
        v = self.velocity(batch.start, batch.t, batch.cond)
        return {"trajectory": losses.trajectory(v, batch.start, batch.end, batch.t, batch.t_next)}
