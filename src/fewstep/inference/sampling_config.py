"""How a model draws: its family's adapters over stand-ins, as its base does or as a student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.core.types import UserError
from fewstep.families.base import Family
from fewstep.families.diffusers_io import read_facts
from fewstep.families.schedulers import of_scheduler, schedule_shift
from fewstep.families.spec import ModelSpec
from fewstep.inference.student_weights import Student


def build_family(outline: ModelSpec, student: Student | None) -> Family:
    """The family with stand-ins for its nets, drawing as the base does or as the student."""
    architecture, parts = outline.architecture, outline.stand_ins()
    facts = {} if outline.folder is None else read_facts(outline.folder)
    name = str(facts.get("name") or outline.name)
    options = architecture.assemble_options(facts)
    if student is not None:
        name = student.name
        options |= architecture.assemble_options({"steps": student.steps, "guidance": student.guidance})
        parts["scheduler"] = _scheduler(parts["scheduler"], student)
    return architecture.assemble(parts, name=name, **options)


def _scheduler(scheduler: Any, student: Student) -> Any:
    if student.schedule is not None:
        return student.schedule.scheduler()
    schedule = of_scheduler(scheduler)
    return replace(schedule, stochastic_sampling=student.sampler == "renoise").scheduler()


def latent_size(size: str | None, outline: ModelSpec, family: Family) -> tuple[int, int]:
    """Height and width of the latents of pictures of ``size``.

    Raises:
        UserError: it is no size, or none that the net can draw.
    """
    if size is None:
        return family.latent[1], family.latent[2]
    sides = size.lower().split("x")
    unit = outline.downscale * outline.patch
    most = outline.max_side
    if len(sides) > 2 or not all(s.isascii() and s.isdigit() and len(s) < 7 for s in sides):
        raise UserError(f"--size must be pixels such as 1024 or 1344x768, not {size[:40]}")
    width, height = int(sides[0]), int(sides[-1])
    for side in (width, height):
        if side % unit or not 0 < side <= most:
            raise UserError(f"--size must be of multiples of {unit} up to {most}, not {size}")
    return height // outline.downscale, width // outline.downscale


def shift_for_size(outline: ModelSpec, family: Family, latents: tuple[int, int]) -> float:
    """The shift of the grid, which may follow from the image's size."""
    tokens = (latents[0] // outline.patch) * (latents[1] // outline.patch)
    return schedule_shift(of_scheduler(family.parts["scheduler"]), tokens)
