"""A diffusers folder as a model that fits a given memory (floor 3, torch)."""

from __future__ import annotations

import gc
import importlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.families import Family
from fewstep.families.folder import bf16_pays, check_device, read_facts, read_json
from fewstep.nets.hoist import hoisted
from fewstep.request import MOST_AT_ONCE, whole
from fewstep.request import memory as bytes_of
from fewstep.staged import Wish
from fewstep.staged.blocks import compile_blocks
from fewstep.staged.model import Codec, Text, Walker
from fewstep.staged.outline import Outline, checked, read
from fewstep.staged.parts import Encoders, Part, Parts, Place, Source, bare, give_back_at_once, trim
from fewstep.staged.plan import CONTEXT, Asked, Choice, Plan, choices, choose
from fewstep.staged.quantize import check as check_bits
from fewstep.staged.rehearse import Rehearsal, quantizable, window_side
from fewstep.staged.student import Student, find
from fewstep.staged.weights import Weights
from fewstep.types import Model, UserError


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


def on_disk(outline: Outline, part: str) -> Weights:
    """The weights of a part in its folder."""
    return Weights.open(outline.place(part))


def staged(
    base: Outline,
    student: Student | None,
    wish: Wish,
    weights: Callable[[Outline, str], Weights] = on_disk,
) -> Staged:
    """A model of an outline.

    Args:
        base: of the base model.
        student: what is laid over it.
        wish: how to run it.
        weights: (outline, part) -> where the part's weights come from.

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
        outline = _with_decoder(outline, Path(wish.tiny_decoder))
    family = _family(outline, student)
    native = 16 if bf16_pays(device) and wish.bits != 32 else 32
    asked = Asked(
        gpu=device != "cpu",
        native=native,
        bits=_bits(wish.bits, native, device),
        text_bits=_text_bits(native, device, outline),
        batch=wish.batch,
        rows=1 if family.guidance in (None, 1) else 2,
        steps=family.steps,
        latents=_latents(wish.size, outline, family),
        image=wish.image,
    )
    plan = _plan(outline, family, asked, wish)
    model = _assembled(outline, family, asked, plan.choice, student, device, wish.compile, weights)
    t5 = "" if base.t5 is None else "left out" if outline.t5 is None else "kept"
    return Staged(model, plan, plan.told(t5))


def _plan(outline: Outline, family: Family, asked: Asked, wish: Wish) -> Plan:
    """How to run: in the device's own precision with everything there, or what fits the memory."""
    if wish.memory is None:
        return Plan(Choice(asked.bits[0], asked.native, 1, "all", asked.batch), gpu=asked.gpu)
    if not asked.gpu:
        give_back_at_once()
    counted = Rehearsal(outline, family, asked).counted
    counted(next(choices(asked))).stages()  # what torch imports for it is in memory from here on
    gc.collect()
    return choose(asked, counted, bytes_of(wish.memory), CONTEXT if asked.gpu else resident())


def resident() -> int:
    """Bytes of this process that are in memory now."""
    trim()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # no Linux: the most there ever was
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return pages * mmap.PAGESIZE


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def _bits(wanted: int | None, native: int, device: str) -> tuple[int, ...]:
    """Bits to choose from: what was asked for, or all that the device has, from its own downwards.

    A CPU that is slow in bf16 skips it: 8 bits times float32 need less, and no more time.
    """
    if wanted is not None:
        return (wanted,)
    return (native, *(bits for bits in (8, 4) if _possible(bits, device)))


def _text_bits(native: int, device: str, outline: Outline) -> tuple[int, ...]:
    few = [bits for bits in (8, 4) if outline.t5 is not None and _possible(bits, device)]
    return (native, *few)


def _possible(bits: int, device: str) -> bool:
    try:
        check_bits(bits, device)
    except UserError:
        return False
    return True


def _with_decoder(outline: Outline, folder: Path) -> Outline:
    """The outline with a tiny autoencoder as its part ``decoder``.

    Raises:
        UserError: the folder holds none, or one of other latents.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--tiny-decoder {folder} is no folder with the config.json of a tiny autoencoder")
    config = checked(folder)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != "AutoencoderTiny":
        raise UserError(f"--tiny-decoder {folder} holds a {kind}, but an AutoencoderTiny is needed")
    mine, its = outline.configs["vae"].get("latent_channels", 4), config.get("latent_channels", 4)
    if mine != its:
        raise UserError(f"--tiny-decoder {folder} reads latents of {its} channels, the model has {mine}")
    return replace(
        outline,
        classes={**outline.classes, "decoder": ("diffusers", "AutoencoderTiny")},
        configs={**outline.configs, "decoder": config},
        stored={**outline.stored, "decoder": Weights.open(folder).stored},
        places={**outline.places, "decoder": folder},
    )


def _family(outline: Outline, student: Student | None) -> Family:
    """The family with stand-ins for its nets, drawing as the base does or as the student."""
    module = importlib.import_module(f"fewstep.families.{outline.kind}")
    parts = outline.parts()
    facts = {} if outline.folder is None else read_facts(outline.folder)
    name = str(facts.get("name") or (outline.folder.stem if outline.folder else outline.kind))
    told = {key: facts[key] for key in ("steps", "guidance", "side") if facts.get(key, 0) != 0}
    if outline.kind == "sd3":
        told.pop("side", None)
    elif told.get("guidance") is None:
        told.pop("guidance", None)
    if student is not None:
        name = student.name
        told["steps"] = student.steps
        if student.guidance is not None or outline.kind == "sd3":
            told["guidance"] = student.guidance
        parts["scheduler"] = _scheduler(parts["scheduler"], student)
    return module.assemble(parts, name=name, **told)


def _scheduler(scheduler: Any, student: Student) -> Any:
    changed: dict[str, Any] = {"stochastic_sampling": student.sampler == "renoise"}
    if student.shift is not None:
        changed["shift"] = student.shift
    return type(scheduler).from_config(scheduler.config, **changed)


def _latents(size: str | None, outline: Outline, family: Family) -> tuple[int, int]:
    """Height and width of the latents of pictures of ``size``.

    Raises:
        UserError: it is no size, or none that the net can draw.
    """
    if size is None:
        return family.latent[1], family.latent[2]
    sides = size.lower().split("x")
    unit = outline.downscale * outline.patch
    most = unit * int(outline.configs["transformer"].get("pos_embed_max_size") or 512)
    if len(sides) > 2 or not all(s.isascii() and s.isdigit() and len(s) < 7 for s in sides):
        raise UserError(f"--size must be pixels such as 1024 or 1344x768, not {size[:40]}")
    width, height = int(sides[0]), int(sides[-1])
    for side in (width, height):
        if side % unit or not 0 < side <= most:
            raise UserError(f"--size must be of multiples of {unit} up to {most}, not {size}")
    return height // outline.downscale, width // outline.downscale


def _assembled(
    outline: Outline,
    family: Family,
    asked: Asked,
    choice: Choice,
    student: Student | None,
    device: str,
    compile: bool,
    weights: Callable[[Outline, str], Weights],
) -> Model:
    """The model, its parts where the choice says."""
    height, width = asked.latents
    native = torch.float32 if asked.native == 32 else torch.bfloat16
    dtype = {32: torch.float32, 16: torch.bfloat16}.get(choice.bits, native)
    net = bare(outline, "transformer", dtype)

    def source_of(part: str, module: Any, bits: int, dtype: torch.dtype) -> Source:
        few = quantizable(outline, part, module) if bits < 16 else frozenset[str]()
        pixels = device == "cpu" and part in ("vae", "decoder")
        return Source(weights(outline, part), device, dtype, bits, few, pixels=pixels)

    source = source_of("transformer", net, choice.bits, dtype)
    if student is not None:
        own = source.weights if student.net is None else Weights.open(student.net)
        source = replace(source, weights=own, change=student.lora)
    if outline.kind == "sd3":
        source = replace(source, window=_cropped(net, outline, asked.latents))
    paths = {id(layer): f"{path}." for path, layer in net.named_modules()}
    modulation, body = hoisted(net)
    if compile:
        compile_blocks(body)
    apart = [modulation.embedder, *modulation.layers]
    layers = {id(layer): Part(layer, source, paths[id(layer)]) for layer in apart}
    parts: dict[str, Part | Parts] = {"transformer": Part(body, source)}
    for part in outline.configs.keys() - {"transformer"}:
        bits = choice.text_bits if part == outline.t5 else asked.native
        module = bare(outline, part, native)
        parts[part] = Part(module, source_of(part, module, bits, native))
    codecs = {outline.decoder, *(["vae"] if asked.image else [])}
    stay = codecs if choice.stay == "codec" else set[str]()
    if choice.stay == "all":
        parts["modulation"] = Parts(list(layers.values()))
        stay = {*outline.encoders, "transformer", "modulation", *codecs}
    place = Place(parts, frozenset(stay))
    place.settle()
    velocity: Any = family.velocity
    text: Any = family.text
    return Model(
        name=family.name,
        velocity=Walker(
            place, replace(velocity, net=body), modulation, {} if choice.stay == "all" else layers
        ),
        text=Text(replace(text, parts=Encoders(place, text.parts, outline.encoders)), device, native),
        codec=Codec(place, outline.decoder, choice.tiles, asked.latents, outline.downscale),
        latent=(family.latent[0], height, width),
        downscale=outline.downscale,
        shift=_shift(outline, family, asked.latents),
        steps=family.steps,
        guidance=family.guidance,
        sampler=family.sampler,
        lift=lambda array: torch.from_numpy(array).to(device),
        lower=lambda tensor: tensor.detach().float().cpu().numpy(),
    )


def _cropped(
    net: Any, outline: Outline, latents: tuple[int, int]
) -> tuple[str, tuple[int, ...], tuple[slice, ...]]:
    """Leave of the net's table of positions what the picture needs; what to read of its file."""
    embed = net.pos_embed
    most, width = int(embed.pos_embed_max_size), embed.pos_embed.shape[-1]
    side = window_side(outline, latents)
    start = (most - side) // 2
    embed.pos_embed_max_size = side
    embed.pos_embed = torch.empty(1, side * side, width, dtype=embed.pos_embed.dtype, device="meta")
    cut = (slice(start, start + side),) * 2
    return "pos_embed.pos_embed", (most, most, width), cut


def _shift(outline: Outline, family: Family, latents: tuple[int, int]) -> float:
    """The shift of the grid; FLUX's follows from the picture's size."""
    if outline.kind != "flux":
        return family.shift
    tokens = (latents[0] // outline.patch) * (latents[1] // outline.patch)
    return family.module.time_shift(family.parts["scheduler"].config, tokens)
