"""The second stage of SD3.5-Flash (arXiv 2509.21318): distribution matching with the adversarial loss.

The chain around it, with warm start, split and merge, is :mod:`fewstep.distill.recipes.flash`. The loss of
the warm start is kept as a third term, which the paper does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core.types import Batch, Sampler, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.dmd import DistributionMatching, ida_updates
from fewstep.methods.ladd import AdversarialLoss
from fewstep.methods.rollout import Rollout, rollouts
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
        fresh_rollouts: whether each update of proxy and heads sees trajectories of its own.
        sampler: how the student's trajectories are sampled.
        heads_weight: weight of the heads' loss for the proxy, whose features they read (DMD2: 0.01).
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
    fresh_rollouts: bool = False
    sampler: Sampler = "euler"
    heads_weight: float = 0.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, **self.auxiliary_nets}

    @property
    def auxiliary_nets(self) -> dict[str, Module]:
        """The nets that are trained beside the student."""
        return {"proxy": self.proxy, "heads": self.adversarial.heads}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid, sampler=self.sampler)
        return [
            *self.auxiliary_updates(rollout),
            Update("student", partial(self.losses, rollout)),
            *ida_updates(self.proxy, self.student, self.ida_decay),
        ]

    def auxiliary_updates(self, rollout: Rollout) -> Sequence[Update | InPlaceUpdate]:
        """Return the updates of proxy and heads that come before the student's."""
        *proxies, heads = rollouts(rollout, self.proxy_updates + 1, self.fresh_rollouts)
        return [
            *(Update("proxy", partial(self._proxy_loss, own)) for own in proxies),
            InPlaceUpdate("heads", self.adversarial.reset_heads),
            Update("heads", partial(self.adversarial.discriminator_loss, heads)),
        ]

    def _proxy_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        terms = dict(self.matching.proxy_loss(rollout, batch, random))
        if self.heads_weight:
            terms["backbone"] = self.heads_weight * self.adversarial.backbone_loss(rollout, batch, random)
        return terms

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
