"""What a distillation needs, loaded and checked: teacher, samples, start, roles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.progress import stage
from fewstep.core.types import UserError
from fewstep.distill.context import DistillConfig, DistillContext

if TYPE_CHECKING:
    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.families.base import Family
    from fewstep.modules.lora import LoRARoles

SUBSTEPS = 4
"""Steps of the teacher for each of the student's, where walks are made for the run."""


def build_context(
    setting: DistillConfig, name: str, *, walks: bool = False, split: bool = False, folder: Path | None = None
) -> DistillContext:
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

    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.pipeline.loading import load_family
    from fewstep.train.device import resolve_device
    from fewstep.train.distributed import world

    if setting.threads:
        torch.set_num_threads(setting.threads)
    place = resolve_device(setting.device)
    out = setting.output or Path("runs") / name
    # What is cheap to refuse comes before gigabytes are loaded.
    if not setting.samples and world().size > 1:
        raise UserError(
            "several processes need --samples: make the samples first, with fewstep sample-teacher"
        )
    given = TeacherSamples.open(setting.samples) if setting.samples else None
    prompts = _prompts(setting) if given is None else []
    with stage(f"loading {setting.teacher}"):
        teacher = load_family(setting.teacher, device=place, dtype=setting.dtype)
    begin = teacher
    if setting.init and not setting.lora:
        begin = load_family(setting.init)  # to be copied from, on the CPU: the device holds what learns
        if _shapes(begin) != _shapes(teacher):
            raise UserError(f"--init {setting.init} is no model of the teacher's kind")
    made = _synthesized(setting, teacher, prompts, out / "walks") if given is None else given
    _fit(made, teacher, setting.student_steps if walks else 0, setting.t5_dropout)
    roles = make_lora_roles(setting, teacher, split) if setting.lora else None
    return DistillContext(setting, name, folder or out, teacher, made, begin, type(teacher.net), roles)


def _shapes(family: Family) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in family.net.state_dict().items()}


def make_lora_roles(setting: DistillConfig, teacher: Family, split: bool = False) -> LoRARoles:
    """Roles of the teacher's net, no more than learn; the student's and its branches' begin as ``--init``, a
    LoRA of an earlier run."""
    from fewstep.families.lora.role_files import load_role
    from fewstep.modules.lora import LoRARoles

    students = ("early", "late") if split else ("student",)
    names = (*students, "proxy")
    roles = LoRARoles(
        teacher.net, names, rank=setting.lora, targets=teacher.architecture.lora_targets, seed=setting.seed
    )
    if setting.init:
        for name in students:
            load_role(roles, name, Path(setting.init))
    return roles


def _prompts(setting: DistillConfig) -> list[str]:
    from fewstep.data.captions import prompts_of
    from fewstep.data.shards import training_shards

    return prompts_of(training_shards(setting.data), setting.num_samples, setting.seed)


def _synthesized(setting: DistillConfig, teacher: Family, prompts: list[str], folder: Path) -> TeacherSamples:
    """The samples of the run's own folder; those that are there already are kept."""
    from fewstep.data.teacher_samples import manifest
    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.data.teacher_samples.write import write_samples
    from fewstep.families.common import fingerprint

    scale = setting.guidance
    if scale is not None:
        teacher = teacher.with_guidance(scale)
    plan = manifest.make(
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

        write_samples(teacher, prompts, plan, folder, progress=progress)
    return TeacherSamples.open(folder)


def _fit(made: TeacherSamples, family: Family, student_steps: int, drop_t5: float) -> None:
    """Refuse samples that the student cannot learn from.

    Raises:
        UserError: they are of another teacher, or their times are not the student's.
    """
    from fewstep.families.common import fingerprint

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
            raise UserError(f"{folder} holds captions read without T5: give --t5-dropout 1")
