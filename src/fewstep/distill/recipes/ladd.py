"""``fewstep distill ladd``."""

from __future__ import annotations

from typing import Literal

from fewstep.distill.adversarial import adversarial_loss
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    disc_input: Literal["finals", "last", "estimates"] = "estimates",
    kind: Literal["softplus", "hinge"] = "hinge",
    heads_lr: float = 1e-3,
) -> Run:
    """The adversarial loss alone, on features of the frozen teacher; by default like LADD.

    Args:
        config: Shared.
        disc_input: What the heads see: samples with the gradient of all steps or of the last, or an estimate
            at a random step.
        kind: The loss.
        heads_lr: Learning rate of the heads.
    """
    from fewstep.methods.ladd import LADD

    check_options(config, heads_lr=heads_lr)
    context = build_context(config, "ladd")
    loss = adversarial_loss(
        context, context.plain_teacher, context.teacher.blocks, disc_input=disc_input, kind=kind
    )
    method = LADD(context.student.net, context.student.velocity, loss, context.grid)
    return build_run(context, method, net_lrs={"heads": heads_lr})
