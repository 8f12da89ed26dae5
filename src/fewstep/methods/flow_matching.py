"""Flow matching: how a teacher learns from data, and how any net is fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update


@dataclass(frozen=True)
class Finetune:
    """Minimise ``|| v(x_t, t) - (eps - x_0) ||^2`` over times of a density.

    The batch's condition is already what the net shall see: captions dropped for guidance are empty there.

    Attributes:
        net: the torch module that learns.
        velocity: the same net as a velocity.
        density: times that training draws (:mod:`fewstep.core.schedule`).
    """

    net: Any
    velocity: Velocity
    density: schedule.Density = schedule.logit_normal

    @property
    def nets(self) -> dict[str, Any]:
        return {"net": self.net}

    def turns(self, step: int) -> Sequence[Update]:
        return [Update("net", self.losses)]

    def losses(self, batch: Batch, draw: StepRandom) -> Losses:
        """``batch.latents`` ``[B, C, H, W]`` -> the loss."""
        x0 = batch.latents
        t, noise = draw.times(self.density, x0), draw.noise(x0)
        v = self.velocity(flow.interpolate(x0, noise, t), t, batch.cond)
        return {"flow": losses.flow_matching(v, noise, x0)}
