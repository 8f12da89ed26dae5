"""``fewstep distill ladd``."""

from __future__ import annotations

from typing import Literal

from fewstep.core.validate import require_positive
from fewstep.distill.adversarial import adversarial_loss
from fewstep.distill.checks import check_options, refuse_teacher_guidance
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    disc_input: Literal["noised-data", "estimates", "finals", "last"] = "noised-data",
    heads: Literal["conv", "token"] = "conv",
    heads_updates: int = 2,
    heads_lr: float = 1e-3,
    disc_density: Literal["logit-normal", "uniform"] = "logit-normal",
    disc_shift: float = 2.718,
    kind: Literal["softplus", "hinge"] = "hinge",
    trajectory_weight: float = 0.0,
) -> Run:
    """The adversarial loss alone, on features of the frozen teacher, as in LADD.

    Args:
        config: Shared.
        disc_input: What the heads see: estimates from noised samples of the teacher, or of a random step.
            Or samples, with the gradient of all steps or of the last.
        heads: Heads over the grid of an image's tokens, or on each token.
        heads_updates: Updates of the heads per update of the student.
        heads_lr: Learning rate of the heads.
        disc_density: Density of the times to which both sides are noised before the heads see them.
        disc_shift: Its shift towards noise. LADD's logit-normal density of mean 1 has 2.718.
        kind: The loss.
        trajectory_weight: Weight of trajectory guidance beside the adversarial loss.
    """
    from fewstep.core import schedule
    from fewstep.methods.ladd import LADD

    refuse_teacher_guidance(config, "ladd")
    check_options(config, heads_lr=heads_lr, trajectory_weight=trajectory_weight)
    require_positive(heads_updates=heads_updates)
    density = schedule.density(disc_density, disc_shift)
    context = build_context(config, "ladd", trajectories=trajectory_weight > 0)
    loss = adversarial_loss(
        context,
        context.plain_teacher,
        context.teacher.blocks,
        heads=heads,
        disc_input=disc_input,
        density=density,
        kind=kind,
    )
    student = context.student
    method = LADD(student.net, student.velocity, loss, context.grid, heads_updates, trajectory_weight)
    return build_run(context, method, net_lrs={"heads": heads_lr})
