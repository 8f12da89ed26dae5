"""``fewstep distill lcm``."""

from __future__ import annotations

from dataclasses import replace

from fewstep.core.types import UserError
from fewstep.core.validate import require_positive
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    teacher_steps: int = 32,
    target_ema: float = 0.95,
    trajectory_weight: float = 0.0,
) -> Run:
    """Consistency distillation, like LCM: the estimates at neighbouring times of the teacher's grid agree.

    Args:
        config: Shared.
        teacher_steps: Steps of the teacher's grid.
        target_ema: Decay of the net that makes the targets and follows the student; 0 takes the student.
            With --lora the student makes them.
        trajectory_weight: Weight of trajectory guidance beside consistency.
    """
    from fewstep.core import schedule
    from fewstep.methods.lcm import LCM

    check_options(config, trajectory_weight=trajectory_weight)
    require_positive(teacher_steps=teacher_steps)
    if not 0 <= target_ema < 1:
        raise UserError(f"--target-ema must be at least 0 and below 1, not {target_ema}")
    context = build_context(config, "lcm", trajectories=trajectory_weight > 0)
    context = replace(context, sampler="renoise")
    student = context.student
    target = context.trainable("target", context.initial) if target_ema and not config.lora else None
    method = LCM(
        student.net,
        student.velocity,
        context.guided_teacher,
        schedule.grid(teacher_steps, context.teacher.shift),
        None if target is None else target.net,
        None if target is None else target.velocity,
        target_ema,
        trajectory_weight,
        context.grid,
    )
    return build_run(context, method, *([] if target is None else [target]))
