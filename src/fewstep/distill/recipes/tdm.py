"""``fewstep distill tdm``."""

from __future__ import annotations

from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(*, config: DistillConfig = DEFAULT, proxy_updates: int = 5, proxy_lr: float | None = None) -> Run:
    """Trajectory distribution matching: each student step is matched on its own interval of time.

    Args:
        config: Shared.
        proxy_updates: Updates of the proxy per update of the student.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.tdm import TDM

    check_options(config, proxy_updates=proxy_updates, proxy_lr=proxy_lr)
    context = build_context(config, "tdm")
    proxy, student = context.trainable("proxy"), context.student
    method = TDM(
        student.net,
        student.velocity,
        proxy.net,
        proxy.velocity,
        context.guided_teacher,
        context.grid,
        proxy_updates,
    )
    return build_run(context, method, proxy, net_lrs={"proxy": proxy_lr or config.lr})
