"""``fewstep distill lcm``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from fewstep.core.types import UserError
from fewstep.core.validate import require_positive
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run

if TYPE_CHECKING:
    from fewstep.distill.context import DistillContext, Trainable


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    teacher_steps: int = 32,
    target_ema: float = 0.95,
    loss: Literal["pseudo-huber", "l2"] = "pseudo-huber",
    trajectory_weight: float = 0.0,
) -> Run:
    """Consistency distillation, like LCM: the estimates at neighbouring times of the teacher's grid agree.

    Args:
        config: Shared.
        teacher_steps: Steps of the teacher's grid.
        target_ema: Decay of the average of the student that makes the target's estimates; 0 is the student
            itself.
        loss: Distance of the two estimates.
        trajectory_weight: Weight of trajectory guidance beside the loss.
    """
    from fewstep.core import schedule
    from fewstep.methods.lcm import LCM, Target

    check_options(config, trajectory_weight=trajectory_weight)
    require_positive(teacher_steps=teacher_steps)
    if not 0 <= target_ema < 1:
        raise UserError(f"--target-ema must be at least 0 and below 1, not {target_ema}")
    context = replace(build_context(config, "lcm", trajectories=trajectory_weight > 0), sampler="renoise")
    grid = schedule.grid(teacher_steps, context.teacher.shift)
    student = context.student
    trained = [target_net(context)] if target_ema else []
    target = Target(trained[0].net, trained[0].velocity, target_ema) if trained else None
    method = LCM(
        student.net,
        student.velocity,
        context.guided_teacher,
        grid,
        target,
        loss,
        trajectory_weight,
        context.grid,
    )
    return build_run(context, method, *trained)


def target_net(context: DistillContext) -> Trainable:
    """Return a copy of the student for the target."""
    import torch

    if context.adapters is None:
        return context.trainable("target", context.initial)
    copy = context.trainable("proxy")  # this method has no proxy, so that adapter is free
    with torch.no_grad():
        for own, student in zip(copy.net.parameters(), context.student.net.parameters(), strict=True):
            own.copy_(student)
    return copy
