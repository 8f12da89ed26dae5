"""A diffusers folder as a model that fits a given memory (floor 3, torch)."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.families import Family
from fewstep.families.folder import bf16_pays, check_device
from fewstep.request import MOST_AT_ONCE, whole
from fewstep.request import memory as bytes_of
from fewstep.staged import Wish
from fewstep.staged.assemble import Assembly, Opened, on_disk
from fewstep.staged.draws import family_of, latents_of
from fewstep.staged.outline import Outline, read, with_decoder
from fewstep.staged.plan import CONTEXT, Asked, Choice, Plan, choices, choose
from fewstep.staged.process import give_back_at_once, resident
from fewstep.staged.quantize import check as check_bits
from fewstep.staged.quantize import lacking
from fewstep.staged.rehearse import Rehearsal
from fewstep.staged.student import Student, find, loras_of
from fewstep.types import Model

STARTING = 2**25
"""Bytes that a process takes at its first picture on a CPU, once and whatever it draws (some 28 MiB with
torch 2.13: kernels that are made then, and threads)."""


@dataclass(frozen=True)
class Staged:
    """A model and how it was decided to run.

    Attributes:
        model: ready to draw.
        plan: what was chosen.
        lines: the plan, told; none where no memory was given.
    """

    model: Model
    plan: Plan
    lines: list[str]


def load(folder: Path, kind: str, wish: Wish) -> Staged:
    """Load a diffusers folder for generation.

    Args:
        folder: the base model.
        kind: name of its family's module.
        wish: how to run it.

    Raises:
        UserError: the model or the student is missing, foreign or broken; the device lacks what was asked
            for; or nothing fits the memory.
    """
    if wish.memory is not None:
        bytes_of(wish.memory)
    whole("batch", wish.batch, 1, MOST_AT_ONCE)
    base = read(folder, kind)
    return staged(base, None if wish.student is None else find(wish.student, base), wish)


def staged(base: Outline, student: Student | None, wish: Wish, opened: Opened = on_disk) -> Staged:
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
        outline = with_decoder(outline, Path(wish.tiny_decoder))
    loras = loras_of(wish.lora, outline)
    family = family_of(outline, student)
    asked = _asked(wish, outline, family, device)
    plan = _plan(outline, family, asked, wish)
    model = Assembly(outline, family, asked, plan, student, device, opened, wish.compile, loras).model()
    t5 = "" if base.t5 is None else "left out" if outline.t5 is None else "kept"
    return Staged(model, plan, plan.told(t5))


def _asked(wish: Wish, outline: Outline, family: Family, device: str) -> Asked:
    """What a plan is for; its bits are those that somebody insists on, or the device's own and all fewer.

    A CPU that is slow in bf16 skips it: 8 bits times float32 need less, and no more time.
    """
    native = 16 if bf16_pays(device) and wish.bits != 32 else 32
    fewer = (native, *(bits for bits in (8, 4) if lacking(bits, device) is None))
    return Asked(
        gpu=device != "cpu",
        native=native,
        bits=fewer if wish.bits is None else (wish.bits,),
        text_bits=(native,) if outline.t5 is None else fewer,
        batch=wish.batch,
        rows=1 if family.guidance in (None, 1) else 2,
        steps=family.steps,
        latents=latents_of(wish.size, outline, family),
        image=wish.image,
        compile=wish.compile,
    )


def _plan(outline: Outline, family: Family, asked: Asked, wish: Wish) -> Plan:
    """How to run: in the device's own precision with everything there, or what fits the memory."""
    if wish.memory is None:
        return Plan(Choice(asked.bits[0], asked.native, 1, "all", asked.batch), gpu=asked.gpu)
    if not asked.gpu:
        give_back_at_once()
    rehearsal = Rehearsal(outline, family, asked)
    rehearsal.stages(next(choices(asked)))  # what torch imports for it is in memory from here on
    gc.collect()
    base = CONTEXT if asked.gpu else resident() + STARTING
    plan = choose(asked, rehearsal.stages, bytes_of(wish.memory), base)
    return plan.filled(rehearsal.held.layers(plan.choice.bits))


def device_of(name: str) -> str:
    """``auto``, ``cpu`` or ``cuda`` -> the device.

    Raises:
        UserError: it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
