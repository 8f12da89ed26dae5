"""The options of distribution matching that several recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from fewstep.core.types import UserError
from fewstep.distill.checks import check_options
from fewstep.distill.config import DistillConfig

if TYPE_CHECKING:
    from fewstep.core.types import Velocity
    from fewstep.distill.context import DistillContext
    from fewstep.methods.dmd import DistributionMatching, ProxyTarget, ScorePoint


@Parameter(name="*")
@dataclass(frozen=True)
class MatchingConfig:
    """The options of distribution matching that several recipes share.

    Attributes:
        gradient_on: What the gradient moves: the compared state, the clean estimate, or the velocity, which
            weighs all steps alike. [default: x0 with renoise, else state]
        fresh_rollouts: Simulate new trajectories for each update of the proxy.
        proxy_updates: Updates of the proxy per update of the student.
        ida_decay: Decay of the proxy towards the student after each update (SenseFlow: 0.98); 1 turns it off.
        proxy_lr: Learning rate of the proxy. [default: --lr]
        proxy_density: Density of the times at which the proxy is trained on samples or estimates.
        score_density: Density of the times at which renoised estimates are compared.
        time_shift: Shift of both densities towards noise. [default: the teacher's]
    """

    gradient_on: Literal["state", "x0", "velocity"] | None = None
    fresh_rollouts: bool = False
    proxy_updates: int = 5
    ida_decay: float = 1.0
    proxy_lr: float | None = None
    proxy_density: Literal["uniform", "logit-normal"] = "uniform"
    score_density: Literal["uniform", "logit-normal"] = "uniform"
    time_shift: float | None = None

    def check(self, config: DistillConfig, score_point: ScorePoint) -> None:
        """Refuse options out of their ranges or without effect, before anything is loaded.

        Raises:
            UserError: there is one.
        """
        check_options(
            config, proxy_updates=self.proxy_updates, ida_decay=self.ida_decay, proxy_lr=self.proxy_lr
        )
        if score_point == "renoise" and self.gradient_on == "state":
            raise UserError("--gradient-on state is for shared times: a renoised estimate is no state")
        if score_point != "renoise" and self.score_density != "uniform":
            raise UserError(f"--score-density has no effect with --score-point {score_point}: leave it out")


DEFAULT_MATCHING = MatchingConfig()
"""The options at their defaults."""


def matching_loss(
    context: DistillContext,
    proxy: Velocity,
    score_point: ScorePoint,
    proxy_target: ProxyTarget,
    options: MatchingConfig,
) -> DistributionMatching:
    """Return the losses of distribution matching against the context's guided teacher.

    Args:
        context: the distillation.
        proxy: the proxy as a velocity.
        score_point: where the scores are compared.
        proxy_target: what the proxy models.
        options: the others.
    """
    from fewstep.core import schedule
    from fewstep.methods.dmd import DistributionMatching

    shift = context.teacher.shift if options.time_shift is None else options.time_shift
    return DistributionMatching(
        context.guided_teacher,
        proxy,
        score_point,
        proxy_target,
        schedule.density(options.proxy_density, shift),
        schedule.density(options.score_density, shift),
        options.gradient_on,
    )
