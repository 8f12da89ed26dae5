"""``fewstep distill tdm``."""

from __future__ import annotations

from typing import Literal

from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    proxy_updates: int = 5,
    proxy_lr: float | None = None,
    gradient_on: Literal["state", "x0", "velocity"] = "x0",
    fresh_rollouts: bool = False,
    trajectory_weight: float = 0.0,
) -> Run:
    """Trajectory distribution matching: each student step is matched on its own interval of time.

    Args:
        config: Shared.
        proxy_updates: Updates of the proxy per update of the student.
        proxy_lr: Learning rate of the proxy. [default: --lr]
        gradient_on: What the gradient moves: the end of a step, the clean estimate, or the velocity, which
            weighs all steps alike.
        fresh_rollouts: Simulate new trajectories for each update of the proxy.
        trajectory_weight: Weight of trajectory guidance beside matching.
    """
    from fewstep.methods.tdm import TDM

    check_options(config, proxy_updates=proxy_updates, proxy_lr=proxy_lr, trajectory_weight=trajectory_weight)
    context = build_context(config, "tdm", trajectories=trajectory_weight > 0)
    proxy, student = context.trainable("proxy"), context.student
    method = TDM(
        student.net,
        student.velocity,
        proxy.net,
        proxy.velocity,
        context.guided_teacher,
        context.grid,
        proxy_updates,
        gradient_on,
        fresh_rollouts,
        trajectory_weight,
    )
    return build_run(context, method, proxy, net_lrs={"proxy": proxy_lr or config.lr})
