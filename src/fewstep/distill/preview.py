"""Images of the student while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.core.types import Array, Velocity
from fewstep.distill.context import DistillContext

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 12
"""Prompts of a contact sheet."""


def sample_student(
    context: DistillContext, velocity: Velocity, prompts: Sequence[str], seeds: Sequence[int]
) -> Array:
    """Sample a student: latents ``[B, C, H, W]``, one seed per prompt."""
    import torch

    from fewstep.core import sampling
    from fewstep.families import common

    family = context.teacher
    with torch.no_grad():
        with common.on_device(family), common.cuts_known():
            cond = family.text(prompts)
        if context.config.t5_dropout > 0:
            cond = context.samples.without_t5(cond)
        return sampling.generate_latents(
            family, cond, seeds, context.grid, velocity=velocity, sampler=context.sampler
        )


def draw_preview(context: DistillContext) -> Image:
    """Return a contact sheet of the student: the first prompts of its samples, at fixed seeds."""
    from fewstep.families import common
    from fewstep.train.preview import decode_grid

    prompts = list(dict.fromkeys(context.samples.prompts))[:SHOWN]
    latents = sample_student(context, context.student.velocity, prompts, range(len(prompts)))
    with common.on_device(context.teacher, "vae"):
        return decode_grid(context.teacher, latents, prompts)
