"""A diffusers folder as a model that fits a given memory (floor 3, torch)."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.core.types import Model
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.core.validate import parse_bytes as bytes_of
from fewstep.families.base import Architecture, Family
from fewstep.families.diffusers_io import check_device, prefers_bf16
from fewstep.families.spec import ModelSpec, read, with_tiny_decoder
from fewstep.inference.build import ModelBuilder, Opened, on_disk
from fewstep.inference.host_memory import rss, set_malloc_thresholds
from fewstep.inference.memory_plan import CONTEXT, ExecutionConfig, Plan, PlanConstraints, choices, choose
from fewstep.inference.memory_profile import MemoryProfiler
from fewstep.inference.options import TorchOptions
from fewstep.inference.quantize import check as check_bits
from fewstep.inference.quantize import unsupported
from fewstep.inference.sampling_config import build_family, latent_size
from fewstep.inference.student_weights import Student, load_student, loras_of

STARTING = 2**25
"""Bytes that a process takes at its first picture on a CPU, once and whatever it draws (some 28 MiB with
torch 2.13: kernels that are made then, and threads)."""


@dataclass(frozen=True)
class PlannedModel:
    """A model and how it was decided to run.

    Attributes:
        model: ready to draw.
        plan: what was chosen.
        lines: the plan, told; none where no memory was given.
    """

    model: Model
    plan: Plan
    lines: list[str]


def load(folder: Path, architecture: Architecture, wish: TorchOptions) -> PlannedModel:
    """Load a diffusers folder for generation.

    Args:
        folder: the base model.
        architecture: its family.
        wish: how to run it.

    Raises:
        UserError: the model or the student is missing, foreign or broken; the device lacks what was asked
            for; or nothing fits the memory.
    """
    if wish.memory is not None:
        bytes_of(wish.memory)
    check_int("batch", wish.batch, 1, MOST_AT_ONCE)
    base = read(folder, architecture)
    return staged(base, None if wish.student is None else load_student(wish.student, base), wish)


def staged(
    base: ModelSpec, student: Student | None, wish: TorchOptions, opened: Opened = on_disk
) -> PlannedModel:
    """A model of an outline.

    Args:
        base: of the base model.
        student: what is laid over it.
        wish: how to run it.
        opened: (outline, part) -> where the part's weights come from.

    Raises:
        UserError: see :func:`load`.
    """
    device = device_of(wish.device)
    if wish.bits is not None:
        check_bits(wish.bits, device)
    outline = base
    if student is not None and not student.t5 and base.t5 is not None:
        outline = base.without(base.t5)
    if wish.tiny_decoder is not None:
        outline = with_tiny_decoder(outline, Path(wish.tiny_decoder))
    loras = loras_of(wish.lora, outline)
    family = build_family(outline, student)
    asked = _asked(wish, outline, family, device)
    plan = _plan(outline, family, asked, wish)
    model = ModelBuilder(outline, family, asked, plan, student, device, opened, wish.compile, loras).model()
    t5 = "" if base.t5 is None else "left out" if outline.t5 is None else "kept"
    return PlannedModel(model, plan, plan.describe(t5))


def _asked(wish: TorchOptions, outline: ModelSpec, family: Family, device: str) -> PlanConstraints:
    """What a plan is for; its bits are those that somebody insists on, or the device's own and all fewer.

    A CPU that is slow in bf16 skips it: 8 bits times float32 need less, and no more time.
    """
    native = 16 if prefers_bf16(device) and wish.bits != 32 else 32
    fewer = (native, *(bits for bits in (8, 4) if unsupported(bits, device) is None))
    return PlanConstraints(
        gpu=device != "cpu",
        native=native,
        bits=fewer if wish.bits is None else (wish.bits,),
        text_bits=(native,) if outline.t5 is None else fewer,
        batch=wish.batch,
        rows=1 if family.guidance in (None, 1) else 2,
        steps=family.steps,
        latents=latent_size(wish.size, outline, family),
        image=wish.image,
        compile=wish.compile,
    )


def _plan(outline: ModelSpec, family: Family, asked: PlanConstraints, wish: TorchOptions) -> Plan:
    """How to run: in the device's own precision with everything there, or what fits the memory."""
    if wish.memory is None:
        return Plan(ExecutionConfig(asked.bits[0], asked.native, 1, "all", asked.batch), gpu=asked.gpu)
    if not asked.gpu:
        set_malloc_thresholds()
    rehearsal = MemoryProfiler(outline, family, asked)
    rehearsal.stages(next(choices(asked)))  # what torch imports for it is in memory from here on
    gc.collect()
    base = CONTEXT if asked.gpu else rss() + STARTING
    plan = choose(asked, rehearsal.stages, bytes_of(wish.memory), base)
    return plan.with_resident_layers(rehearsal.held.layers(plan.config.bits))


def device_of(name: str) -> str:
    """``auto``, ``cpu`` or ``cuda`` -> the device.

    Raises:
        UserError: it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
