"""Flow matching: the loss that trains a teacher on data, or fine-tunes any net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class FlowMatching:
    """Minimise ``|| v(x_t, t) - (eps - x_0) ||^2`` over random times.

    The batch's conditions are used as they are: captions dropped for guidance are empty there.

    Attributes:
        net: the module that is trained.
        velocity: the same net as a velocity.
        density: of the times (:mod:`fewstep.core.schedule`).
    """

    net: Module
    velocity: Velocity
    density: schedule.Density = schedule.logit_normal

    @property
    def nets(self) -> dict[str, Module]:
        return {"net": self.net}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("net", self.losses)]

    def losses(self, batch: Batch, random: StepRandom) -> Losses:
        """Return the loss on ``batch.latents`` ``[B, C, H, W]``."""
        x0 = batch.latents
        t, noise = random.times(self.density, x0), random.noise(x0)
        v = self.velocity(flow.interpolate(x0, noise, t), t, batch.cond)
        return {"flow": losses.flow_matching(v, noise, x0)}
