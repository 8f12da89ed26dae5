"""``fewstep distill trajectory``."""

from __future__ import annotations

from fewstep.distill.checks import refuse_teacher_guidance
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(*, config: DistillConfig = DEFAULT) -> Run:
    """Trajectory guidance, the warm start: each student step regresses several steps of the guided teacher.

    Args:
        config: Shared.
    """
    from fewstep.methods.trajectory import Trajectory

    refuse_teacher_guidance(config, "trajectory")
    context = build_context(config, "trajectory", trajectories=True)
    student = context.student
    return build_run(context, Trajectory(student.net, student.velocity, context.grid))
