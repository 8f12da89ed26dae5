"""The third stage of SD3.5-Flash (arXiv 2509.21318): distribution matching and the adversarial loss at once.

The chain around it, warm start, split and merge, is :mod:`fewstep.distill.recipes`. Ours keeps the
warm start's own loss beside the two, as an anchor; the paper has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.dmd import DistributionMatching, implicit_distribution_alignment
from fewstep.methods.ladd import AdversarialLoss
from fewstep.methods.rollout import Rollout
from fewstep.methods.trajectory import trajectory_loss


@dataclass(frozen=True)
class Flash:
    """The proxy learns, the heads learn, the student learns from both.

    Attributes:
        student: the module that learns, a few-step net.
        velocity: the same as a velocity.
        proxy: the module of ``matching.proxy``.
        matching: distribution matching.
        adversarial: the adversarial loss; its taps are the proxy's or the teacher's.
        grid: the student's times.
        updates: turns of the proxy before each of the student's.
        follow: how much of itself the proxy keeps when it follows the student after a step; 1: all.
        anchor: weight of trajectory guidance; above 0 the batch must carry the teacher's walks.
    """

    student: Any
    velocity: Velocity
    proxy: Any
    matching: DistributionMatching
    adversarial: AdversarialLoss
    grid: Sequence[float]
    updates: int = 5
    follow: float = 1.0
    anchor: float = 1.0

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student, **self.rivals}

    @property
    def rivals(self) -> dict[str, Any]:
        """The nets that learn beside the student."""
        return {"proxy": self.proxy, "heads": self.adversarial.heads}

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        turns: list[Update | InPlaceUpdate] = [
            *self.before(rollout),
            Update("student", partial(self.losses, rollout)),
        ]
        if self.follow < 1:
            turns.append(
                InPlaceUpdate(
                    "proxy", partial(implicit_distribution_alignment, self.proxy, self.student, self.follow)
                )
            )
        return turns

    def before(self, rollout: Rollout) -> Sequence[Update | InPlaceUpdate]:
        """The turns of proxy and heads that come before the student's."""
        return [
            *[Update("proxy", partial(self.matching.proxy_loss, rollout))] * self.updates,
            InPlaceUpdate("heads", self.adversarial.renew),
            Update("heads", partial(self.adversarial.discriminator_loss, rollout)),
        ]

    def losses(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        """The student's losses, at the steps of ``rollout`` that learn."""
        told = {
            **self.matching.student_loss(rollout, batch, draw),
            **self.adversarial.generator_loss(rollout, batch, draw),
        }
        if self.anchor:
            steps = rollout.learns or range(rollout.steps)
            kept = trajectory_loss(self.velocity, self.grid, steps, batch, draw)["trajectory"]
            told["trajectory"] = self.anchor * kept
        return told
