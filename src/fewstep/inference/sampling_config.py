"""The sampling configuration of a model: its family without weights, image size and shift."""

from __future__ import annotations

from dataclasses import replace

from fewstep.core.types import UserError
from fewstep.families.base import Family
from fewstep.families.diffusers_io import read_facts
from fewstep.families.schedulers import of_scheduler, schedule_shift
from fewstep.families.spec import ModelSpec
from fewstep.inference.student_weights import Student


def build_family(spec: ModelSpec, student: Student | None) -> Family:
    """Return the family with placeholders for its nets, and with the sampling of the student or base."""
    architecture, parts = spec.architecture, spec.stand_ins()
    facts = {} if spec.folder is None else read_facts(spec.folder)
    name = str(facts.get("name") or spec.name)
    options = architecture.assemble_options(facts)
    if student is not None:
        name = student.name
        options |= architecture.assemble_options({"steps": student.steps, "guidance": student.guidance})
        parts["scheduler"] = _scheduler(parts["scheduler"], student)
    return architecture.assemble(parts, name=name, **options)


def _scheduler(scheduler: object, student: Student) -> object:
    if student.schedule is not None:
        return student.schedule.scheduler()
    schedule = of_scheduler(scheduler)
    return replace(schedule, stochastic_sampling=student.sampler == "renoise").scheduler()


def latent_size(size: str | None, spec: ModelSpec, family: Family) -> tuple[int, int]:
    """Return height and width of the latents of an image of ``size``; ``None`` is the model's own size.

    Raises:
        UserError: the size is invalid, or the net does not support it.
    """
    if size is None:
        return family.latent[1], family.latent[2]
    sides = size.lower().split("x")
    unit = spec.downscale * spec.patch
    max_side = spec.max_side
    if len(sides) > 2 or not all(s.isascii() and s.isdigit() and len(s) < 7 for s in sides):
        raise UserError(f"--size must be pixels such as 1024 or 1344x768, not {size[:40]}")
    width, height = int(sides[0]), int(sides[-1])
    for side in (width, height):
        if side % unit or not 0 < side <= max_side:
            raise UserError(f"--size must be of multiples of {unit} up to {max_side}, not {size}")
    return height // spec.downscale, width // spec.downscale


def shift_for_size(spec: ModelSpec, family: Family, latents: tuple[int, int]) -> float:
    """Return the time shift of the schedule, which may depend on the image size."""
    tokens = (latents[0] // spec.patch) * (latents[1] // spec.patch)
    return schedule_shift(of_scheduler(family.parts["scheduler"]), tokens)
