"""Write the student of a distillation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.distill.context import DistillContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

LORA = "lora"
"""Subfolder of a run for the student's LoRA adapter, beside ``model``."""


def write_student(context: DistillContext, nets: Mapping[str, Module]) -> None:
    """Write the trained student as a diffusers folder ``model``, a LoRA adapter also as ``lora``.

    The adapter's folder records the number of steps, the guidance, the sampler and whether T5 is used.
    """
    from fewstep.core.atomic import replacing_folder
    from fewstep.families.diffusers_io import write_facts
    from fewstep.families.lora.role_files import save_role

    if context.adapters is not None:
        facts = {
            "name": f"{context.teacher.name}-{context.name}",
            "steps": context.config.student_steps,
            "guidance": context.teacher.embedded_guidance,
            "sampler": context.sampler,
            "t5": context.config.t5_dropout < 1,
        }
        with replacing_folder(context.folder / LORA) as fresh:
            save_role(context.adapters, "student", fresh)
            write_facts(facts, fresh)
    write_weights(context, context.weights("student", nets))


def keep_student(context: DistillContext, nets: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Write a copy of the student's weights, or of its LoRA adapter, to ``students/STEP.safetensors``."""
    from safetensors.torch import save_file

    from fewstep.core.atomic import replacing_file

    for name, weights in nets.items():
        stem = f"{step:06d}" if name == "student" else f"{step:06d}-{name}"
        path = context.folder / "students" / f"{stem}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as fresh:
            save_file({key: tensor.contiguous().cpu() for key, tensor in weights.items()}, fresh)


def write_weights(context: DistillContext, weights: Mapping[str, Tensor]) -> None:
    """Write a student with these weights as a diffusers folder, with its teacher's licence."""
    from fewstep.core.atomic import replacing_folder
    from fewstep.families import common

    teacher, config = context.teacher, context.config
    net = context.new_net()
    net.load_state_dict(weights)
    student = teacher.student(net, f"{teacher.name}-{context.name}", config.student_steps)
    if config.t5_dropout == 1:
        student = student.without_t5()
    if context.sampler == "renoise":
        student = common.with_renoise_sampler(student)
    licence = Path(config.teacher) / "LICENSE"
    with replacing_folder(context.folder / "model") as fresh:
        student.save(fresh)
        if licence.is_file():
            shutil.copyfile(licence, fresh / "LICENSE")
