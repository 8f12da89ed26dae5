"""What a distillation needs, loaded and checked: teacher, samples, start, roles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.progress import stage
from fewstep.recipes.student import Lesson, Setting
from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.data.synthesis.read import Synthetic
    from fewstep.families import Family
    from fewstep.nets.roles import Roles

SUBSTEPS = 4
"""Steps of the teacher for each of the student's, where walks are made for the run."""


def lesson(
    setting: Setting, name: str, *, walks: bool = False, split: bool = False, folder: Path | None = None
) -> Lesson:
    """Load what a distillation needs, and make the teacher's samples where there are none.

    Args:
        setting: what was asked for.
        name: of the method.
        walks: whether the method needs the teacher's walks, not its samples alone.
        split: whether the student is two branches.
        folder: of the run, where it is not the setting's.

    Raises:
        UserError: a model is missing or of another family, or the samples are another teacher's.
    """
    import torch

    from fewstep.data.synthesis.read import Synthetic
    from fewstep.source import load_family
    from fewstep.train.device import pick
    from fewstep.train.parallel import world

    if setting.threads:
        torch.set_num_threads(setting.threads)
    place = pick(setting.device)
    out = setting.out or Path("runs") / name
    # What is cheap to refuse comes before gigabytes are loaded.
    if not setting.synthetic and world().size > 1:
        raise UserError("several processes need --synthetic: make the samples first, with fewstep synthesize")
    given = Synthetic.open(setting.synthetic) if setting.synthetic else None
    prompts = _prompts(setting) if given is None else []
    with stage(f"loading {setting.teacher}"):
        teacher = load_family(setting.teacher, device=place, dtype=setting.dtype)
    begin = teacher
    if setting.init and not setting.lora:
        begin = load_family(setting.init)  # to be copied from, on the CPU: the device holds what learns
        if _shapes(begin) != _shapes(teacher):
            raise UserError(f"--init {setting.init} is no model of the teacher's kind")
    made = _synthesized(setting, teacher, prompts, out / "walks") if given is None else given
    _fit(made, teacher, setting.student_steps if walks else 0, setting.drop_t5)
    roles = roles_of(setting, teacher, split) if setting.lora else None
    return Lesson(setting, name, folder or out, teacher, made, begin, type(teacher.net), roles)


def _shapes(family: Family) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in family.net.state_dict().items()}


def roles_of(setting: Setting, teacher: Family, split: bool = False) -> Roles:
    """Roles of the teacher's net, no more than learn; the student's and its branches' begin as ``--init``, a
    LoRA of an earlier run."""
    from fewstep.nets.roles import Roles

    students = ("early", "late") if split else ("student",)
    names = (*students, "proxy")
    roles = Roles(teacher.net, names, rank=setting.lora, targets=teacher.module.TARGETS, seed=setting.seed)
    if setting.init:
        for name in students:
            roles.load(name, Path(setting.init))
    return roles


def _prompts(setting: Setting) -> list[str]:
    from fewstep.data.texts import prompts_of
    from fewstep.recipes.parts import training_shards

    return prompts_of(training_shards(setting.data), setting.walks, setting.seed)


def _synthesized(setting: Setting, teacher: Family, prompts: list[str], folder: Path) -> Synthetic:
    """The samples of the run's own folder; those that are there already are kept."""
    from fewstep.data.synthesis import plan as plans
    from fewstep.data.synthesis.read import Synthetic
    from fewstep.data.synthesis.write import synthesize
    from fewstep.recipes.parts import fingerprint

    scale = setting.guidance
    if scale is not None:
        teacher = teacher.at(scale)
    plan = plans.make(
        teacher,
        prompts,
        guidance=teacher.guidance if scale is None else scale,
        steps=setting.student_steps * SUBSTEPS * max(1, 4 // setting.student_steps),
        student_steps=setting.student_steps,
        seed=1_000_000 * (setting.seed + 1),
        weights=fingerprint(teacher.net),
        clip_length=teacher.clip_length,
    )

    with stage("making samples of the teacher") as here:

        def progress(done: int, total: int) -> None:
            here(done, total)
            print(f"walks of the teacher {done}/{total}", file=sys.stderr)

        synthesize(teacher, prompts, plan, folder, progress=progress)
    return Synthetic.open(folder)


def _fit(made: Synthetic, family: Family, student_steps: int, drop_t5: float) -> None:
    """Refuse samples that the student cannot learn from.

    Raises:
        UserError: they are of another teacher, or their times are not the student's.
    """
    from fewstep.recipes.parts import fingerprint

    plan, folder = made.plan, made.folder
    # In half precision a fingerprint is of rounded weights: two of one teacher differ, and say nothing.
    same_kind = f"torch.{plan.dtype}" == str(family.net.dtype)
    other = same_kind and plan.weights != fingerprint(family.net)
    if other or plan.latent != family.latent:
        raise UserError(f"{folder} holds samples of another teacher, {plan.teacher}: give it as --teacher")
    if student_steps and (plan.student_steps == 0 or plan.student_steps % student_steps):
        kept = f"walks at {plan.student_steps} steps" if plan.student_steps else "no walks, latents alone"
        raise UserError(
            f"{folder} holds {kept}, of no use to a student of {student_steps}: synthesize again with "
            f"--student-steps {student_steps}"
        )
    if not plan.t5 and family.clip_length is not None and family.parts["text_encoder_3"] is not None:
        if drop_t5 < 1:
            raise UserError(f"{folder} holds captions read without T5: give --drop-t5 1")
