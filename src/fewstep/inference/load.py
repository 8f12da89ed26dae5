"""Loading of a diffusers folder for generation within a memory limit."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.core.types import Model
from fewstep.core.validate import MOST_AT_ONCE, check_int, parse_bytes
from fewstep.families.base import Architecture, Family
from fewstep.families.diffusers_io import check_device, prefers_bf16
from fewstep.families.spec import ModelSpec, read, with_tiny_decoder
from fewstep.inference.build import ModelBuilder, OpenWeights, on_disk
from fewstep.inference.host_memory import rss, set_malloc_thresholds
from fewstep.inference.memory_plan import CONTEXT, ExecutionConfig, Plan, PlanConstraints, choices, choose
from fewstep.inference.memory_profile import MemoryProfiler
from fewstep.inference.options import TorchOptions
from fewstep.inference.quantize import check as check_bits
from fewstep.inference.quantize import unsupported
from fewstep.inference.sampling_config import build_family, latent_size
from fewstep.inference.student_weights import Student, load_student, read_loras

STARTUP = 2**25
"""Bytes that a process allocates once at its first image on a CPU, for kernels and threads (about 28 MiB with
torch 2.13)."""


@dataclass(frozen=True)
class PlannedModel:
    """A model and its memory plan.

    Attributes:
        model: the model, ready to generate.
        plan: the plan.
        lines: the plan as text; empty without a memory limit.
    """

    model: Model
    plan: Plan
    lines: list[str]


def load(folder: Path, architecture: Architecture, options: TorchOptions) -> PlannedModel:
    """Load a diffusers folder for generation.

    Args:
        folder: the folder of the base model.
        architecture: its family.
        options: how to run it.

    Raises:
        UserError: the model or the student is missing, damaged or of another family; the device does not
            support an option; or no plan fits the memory.
    """
    if options.memory is not None:
        parse_bytes(options.memory)
    check_int("batch", options.batch, 1, MOST_AT_ONCE)
    base = read(folder, architecture)
    return load_spec(base, None if options.student is None else load_student(options.student, base), options)


def load_spec(
    base: ModelSpec, student: Student | None, options: TorchOptions, open_weights: OpenWeights = on_disk
) -> PlannedModel:
    """Load a model by its spec.

    Args:
        base: the spec of the base model.
        student: a student of the base model, if any.
        options: how to run it.
        open_weights: opens the weights of a part, given the spec and the part's name.

    Raises:
        UserError: see :func:`load`.
    """
    device = device_of(options.device)
    if options.bits is not None:
        check_bits(options.bits, device)
    spec = base
    if student is not None and not student.t5 and base.t5 is not None:
        spec = base.without(base.t5)
    if options.tiny_decoder is not None:
        spec = with_tiny_decoder(spec, Path(options.tiny_decoder))
    loras = read_loras(options.lora, spec)
    family = build_family(spec, student)
    constraints = _constraints(options, spec, family, device)
    plan = _plan(spec, family, constraints, options)
    model = ModelBuilder(
        spec, family, constraints, plan, student, device, open_weights, options.compile, loras
    ).model()
    t5 = "" if base.t5 is None else "left out" if spec.t5 is None else "kept"
    return PlannedModel(model, plan, plan.describe(t5))


def _constraints(options: TorchOptions, spec: ModelSpec, family: Family, device: str) -> PlanConstraints:
    """Return the constraints of the plan.

    Candidates are the requested bits, or the device's native precision and all lower ones. A CPU that is slow
    in bfloat16 skips it: 8-bit weights with float32 arithmetic need less memory and no more time.
    """
    native = 16 if prefers_bf16(device) and options.bits != 32 else 32
    precisions = (native, *(bits for bits in (8, 4) if unsupported(bits, device) is None))
    return PlanConstraints(
        gpu=device != "cpu",
        native=native,
        bits=precisions if options.bits is None else (options.bits,),
        text_bits=(native,) if spec.t5 is None else precisions,
        batch=options.batch,
        rows=1 if family.guidance in (None, 1) else 2,
        steps=family.steps,
        latents=latent_size(options.size, spec, family),
        image=options.image,
        compile=options.compile,
    )


def _plan(spec: ModelSpec, family: Family, constraints: PlanConstraints, options: TorchOptions) -> Plan:
    """Return the plan: native precision with all parts resident, or the best that fits the memory."""
    if options.memory is None:
        return Plan(
            ExecutionConfig(constraints.bits[0], constraints.native, 1, "all", constraints.batch),
            gpu=constraints.gpu,
        )
    if not constraints.gpu:
        set_malloc_thresholds()
    profiler = MemoryProfiler(spec, family, constraints)
    # Torch imports modules for this, whose memory is then part of the base.
    profiler.stages(next(choices(constraints)))
    gc.collect()
    base = CONTEXT if constraints.gpu else rss() + STARTUP
    plan = choose(constraints, profiler.stages, parse_bytes(options.memory), base)
    return plan.with_resident_layers(profiler.weight_memory.layers(plan.config.bits))


def device_of(name: str) -> str:
    """Return the device of the name ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
