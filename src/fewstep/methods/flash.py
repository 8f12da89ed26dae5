"""The second stage of SD3.5-Flash (arXiv 2509.21318): distribution matching with the adversarial loss.

The chain around it, with warm start, split and merge, is :mod:`fewstep.distill.recipes.flash`. The loss of
the warm start is kept as a third term, which the paper does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.dmd import DistributionMatching, ida_updates
from fewstep.methods.ladd import AdversarialLoss
from fewstep.methods.rollout import Rollout
from fewstep.methods.trajectory import trajectory_loss

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Flash:
    """Distribution matching, the adversarial loss and trajectory guidance together.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        proxy: the module of ``matching.proxy``.
        matching: distribution matching.
        adversarial: the adversarial loss, on features of the proxy or the teacher.
        grid: the student's times.
        proxy_updates: updates of the proxy before each of the student's.
        ida_decay: decay of the proxy towards the student after each of its updates; 1 turns it off.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
    """

    student: Module
    velocity: Velocity
    proxy: Module
    matching: DistributionMatching
    adversarial: AdversarialLoss
    grid: Sequence[float]
    proxy_updates: int = 5
    ida_decay: float = 1.0
    trajectory_weight: float = 1.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, **self.auxiliary_nets}

    @property
    def auxiliary_nets(self) -> dict[str, Module]:
        """The nets that are trained beside the student."""
        return {"proxy": self.proxy, "heads": self.adversarial.heads}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        return [
            *self.auxiliary_updates(rollout),
            Update("student", partial(self.losses, rollout)),
            *ida_updates(self.proxy, self.student, self.ida_decay),
        ]

    def auxiliary_updates(self, rollout: Rollout) -> Sequence[Update | InPlaceUpdate]:
        """Return the updates of proxy and heads that come before the student's."""
        return [
            *[Update("proxy", partial(self.matching.proxy_loss, rollout))] * self.proxy_updates,
            InPlaceUpdate("heads", self.adversarial.reset_heads),
            Update("heads", partial(self.adversarial.discriminator_loss, rollout)),
        ]

    def losses(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the student's losses, at the trained steps of ``rollout``."""
        terms = {
            **self.matching.student_loss(rollout, batch, random),
            **self.adversarial.generator_loss(rollout, batch, random),
        }
        if self.trajectory_weight:
            steps = rollout.trained_steps or range(rollout.steps)
            guidance = trajectory_loss(self.velocity, self.grid, steps, batch, random)["trajectory"]
            terms["trajectory"] = self.trajectory_weight * guidance
        return terms
