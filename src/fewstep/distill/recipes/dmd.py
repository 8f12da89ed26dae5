"""``fewstep distill dmd``."""

from __future__ import annotations

from typing import Literal

from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    score_point: Literal["shared", "shared-free", "renoise"] = "renoise",
    proxy_target: Literal["finals", "estimates", "path"] = "estimates",
    proxy_updates: int = 5,
    ida_decay: float = 1.0,
    proxy_lr: float | None = None,
) -> Run:
    """Distribution matching alone; by default DMD2 without its adversarial loss.

    Args:
        config: Shared.
        score_point: Where the scores are compared: on the renoised estimate, or on the student's trajectory.
        proxy_target: What the proxy models: the student's samples, its estimates at a random step, or the
            states of its trajectory.
        proxy_updates: Updates of the proxy per update of the student.
        ida_decay: Decay of the proxy towards the student after each update (SenseFlow: 0.98); 1 turns it off.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.dmd import DMD, DistributionMatching

    check_options(config, proxy_updates=proxy_updates, ida_decay=ida_decay, proxy_lr=proxy_lr)
    context = build_context(config, "dmd")
    proxy, student = context.trainable("proxy"), context.student
    matching = DistributionMatching(context.guided_teacher, proxy.velocity, score_point, proxy_target)
    method = DMD(student.net, student.velocity, proxy.net, matching, context.grid, proxy_updates, ida_decay)
    return build_run(context, method, proxy, net_lrs={"proxy": proxy_lr or config.lr})
