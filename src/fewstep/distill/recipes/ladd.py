"""``fewstep distill ladd``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_type_hints

from cyclopts import Parameter

from fewstep.core.validate import require_positive
from fewstep.distill.adversarial import NUM_TAPS, adversarial_loss
from fewstep.distill.checks import check_options, refuse_teacher_guidance
from fewstep.distill.config import DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run

HIGH_NOISE = round(math.e, 3)
"""Shift that makes a logit-normal density one of mean 1, with which LADD works best (section 4.1)."""


@Parameter(name="*")
@dataclass(frozen=True)
class LADDConfig(DistillConfig):
    """The shared options, with a lower learning rate.

    Nothing but the adversarial loss holds the student: at the usual rate a small net is destroyed.
    """

    lr: float = 1e-5


# The command line would look up the shared options' types in this module, which does not import them.
LADDConfig.__init__.__annotations__ = get_type_hints(DistillConfig.__init__, include_extras=True)

DEFAULT = LADDConfig()


def recipe(
    *,
    config: LADDConfig = DEFAULT,
    disc_input: Literal["finals", "last", "estimates", "noised-data"] = "noised-data",
    kind: Literal["softplus", "hinge"] = "hinge",
    disc_density: Literal["uniform", "logit-normal"] = "logit-normal",
    disc_shift: float = HIGH_NOISE,
    heads: Literal["token", "conv"] = "conv",
    num_taps: int = NUM_TAPS,
    heads_updates: int = 2,
    heads_lr: float = 1e-3,
    trajectory_weight: float = 0.0,
) -> Run:
    """The adversarial loss alone, on features of the frozen teacher; by default like LADD.

    Args:
        config: Shared.
        disc_input: What the heads see: samples with the gradient of all steps or of the last, or an estimate
            at a random step. Or an estimate from a noised sample of the teacher.
        kind: The loss.
        disc_density: Density of the times to which the heads' inputs are noised.
        disc_shift: Shift of these times towards noise; 1 is none.
        heads: Judge every token by itself, or with its neighbours.
        num_taps: Blocks whose features the heads read; all of them where there are fewer.
        heads_updates: Updates of the heads per update of the student.
        heads_lr: Learning rate of the heads.
        trajectory_weight: Weight of trajectory guidance beside the loss.
    """
    from fewstep.core import schedule
    from fewstep.methods.ladd import LADD

    refuse_teacher_guidance(config, "ladd")
    check_options(config, heads_lr=heads_lr, trajectory_weight=trajectory_weight)
    require_positive(num_taps=num_taps, heads_updates=heads_updates)
    density = schedule.density(disc_density, disc_shift)
    context = build_context(config, "ladd", trajectories=trajectory_weight > 0)
    loss = adversarial_loss(
        context,
        context.plain_teacher,
        context.teacher.blocks,
        heads=heads,
        num_taps=num_taps,
        disc_input=disc_input,
        density=density,
        kind=kind,
    )
    student = context.student
    method = LADD(student.net, student.velocity, loss, context.grid, heads_updates, trajectory_weight)
    return build_run(context, method, net_lrs={"heads": heads_lr})
