"""``fewstep distill lcm``."""

from __future__ import annotations

from dataclasses import replace

from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(*, config: DistillConfig = DEFAULT, teacher_steps: int = 32) -> Run:
    """Consistency distillation, like LCM: the estimates at neighbouring times of the teacher's grid agree.

    Args:
        config: Shared.
        teacher_steps: Steps of the teacher's grid.
    """
    from fewstep.core import schedule
    from fewstep.methods.lcm import LCM

    context = replace(build_context(config, "lcm"), sampler="renoise")
    grid = schedule.grid(teacher_steps, context.teacher.shift)
    student = context.student
    return build_run(context, LCM(student.net, student.velocity, context.guided_teacher, grid))
