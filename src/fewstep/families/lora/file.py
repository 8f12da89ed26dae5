"""Reads the layers in LoRA files of diffusers, PEFT, kohya, ComfyUI and XLabs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.types import UserError
from fewstep.families.diffusers_io import first_line
from fewstep.families.lora.alpha import Said
from fewstep.families.lora.header import check, short

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_TENSORS = tuple(
    re.compile(rf"(?P<layer>.+){end}", re.DOTALL)
    for end in (
        r"\.lora_(?P<side>[AB])\.(?:(?P<adapter>[^.]+)\.)?weight",
        r"\.lora_(?P<side>[AB])",
        r"\.lora_(?P<side>down|up)\.(?:(?P<chunk>\d{1,2})\.)?weight",
        r"\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight",
        r"(?<=_lora[12])\.(?P<side>down|up)\.weight",  # XLabs
        r"_lora\.(?P<side>down|up)\.weight",
    )
)
_ALPHA = re.compile(r"(?:^|[._])(?:lora_|network_)?alpha$")
_OF_FACTORS = re.compile(r"[._]lora(?:_linear_layer|_A|_B|_down|_up)?(?:[._](?:down|up))?(?:\.weight)?$")
"""Text that may be between a layer's name and ``alpha``."""
_SCALE = re.compile(r"(?:^|[._])\w*(?:scal|strength|multiplier)\w*$")

OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3": "IA3",
    "on_input": "IA3",
    "vera_": "VeRA",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "Tucker factors",
    "lora_embedding_": "an embedding's factors",
    ".diff": "whole differences of weights",
    ".set_weight": "whole weights",
    "_norm": "weights of norms",
    ".norm": "weights of norms",
    ".bias": "biases",
    "bundle_emb": "trained embeddings",
    "emb_params": "trained embeddings",
}
"""Part of a tensor's name -> what is not followed."""

_PREFIXES = {
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "transformer.": "transformer",
    "lora_transformer_": "transformer",
    "lora_unet_": "transformer",
    "lycoris_": "transformer",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "te1",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "te3",
    "lora_te1_": "te1",
    "lora_te2_": "te2",
    "lora_te3_": "te3",
    "lora_te_": "te1",
}
"""Prefix of a layer's name -> its part. Kohya and ComfyUI number text encoders by their kind."""


@dataclass(frozen=True)
class Factors:
    """The two factors of one layer, as a file has them.

    Attributes:
        name: of the layer in the file, without the part's prefix.
        part: that the prefix names.
        flat: whether the name has underscores for dots, as kohya writes it.
        chunk: which of several layers that are one in the authors' code; ``None`` is the layer whole.
        down: name of ``A [rank, in]``.
        up: name of ``B [out, rank]``.
        rank: number of rows of ``A``.
        shape: ``(out, in)`` of the product.
        scale: ``alpha / rank``.
    """

    name: str
    part: str
    flat: bool
    chunk: int | None
    down: str
    up: str
    rank: int
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class Lora:
    """A file's adapter.

    Attributes:
        path: the file.
        factors: of all its layers.
        notes: what was assumed, or is not used.
    """

    path: Path
    factors: tuple[Factors, ...]
    notes: tuple[str, ...] = ()


@contextmanager
def _opened(path: Path) -> Generator[safe_open]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a whole .safetensors file: {first_line(error)}") from None


def tensor_of(path: Path, name: str) -> Tensor:
    """One tensor. The file is open no longer than that: pages that are mapped count as this process's."""
    with _opened(path) as file:
        return file.get_tensor(name).clone()


def read(path: Path) -> Lora:
    """Read what a LoRA says of its layers; of its tensors the alphas alone.

    Raises:
        UserError: it is damaged, no LoRA of a layout that is known, or says something that would change the
            image and is not followed.
    """
    with _opened(path) as file:
        header = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(int(n) for n in one.get_shape()) for name, one in header.items()}
        kinds = {name: str(one.get_dtype()) for name, one in header.items()}
        metadata: dict[str, str] = dict(file.metadata() or {})
        alphas = {name: _alpha(path, name, file.get_tensor(name)) for name in shapes if _ALPHA.search(name)}
    pairs, rest = _pairs(path, shapes)
    others = [name for name in rest if name not in alphas]
    _check_rest(path, others, bool(pairs))
    unused = [name for name in others if not _nothing(name)]
    odd = [name for pair in pairs for name in pair[2:] if kinds[name] not in FLOATS]
    if odd:
        raise UserError(f"{path} holds {short(odd[0])} as {kinds[odd[0]]}: only floats are read")
    peft = any(layer.startswith("base_model.model.") for layer, *_ in pairs)
    layers = {layer for layer, *_ in pairs}
    of_layers, lone = _alphas_of(path, alphas, layers)
    flat = any(_split(layer)[2] for layer in layers)
    said = Said.of(path, metadata, of_layers, peft, flat)
    factors = tuple(_factors(path, shapes, said, *pair) for pair in pairs)
    whole = layers <= of_layers.keys() and (flat or any(".lora_down." in pair[2] for pair in pairs))
    check(path, said.values, [(one.scale, one.rank) for one in factors], informs=whole)
    _check_lone(path, lone, alphas, {pair[0]: one for pair, one in zip(pairs, factors, strict=True)})
    left = [f"the alpha of {listed(sorted(lone))} is not used: there are no factors of it"] if lone else []
    left += [f"{listed(unused)} is not used: it holds nought alone"] if unused else []
    return Lora(path, factors, (*said.notes, *left))


def _alphas_of(
    path: Path, alphas: Mapping[str, float], layers: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Layer -> alpha; and what the others are of -> their names.

    Raises:
        UserError: a layer has two that differ.
    """
    found: dict[str, float] = {}
    lone: dict[str, str] = {}
    for name, alpha in alphas.items():
        base = _ALPHA.sub("", name)
        layer = next((one for one in (base, _OF_FACTORS.sub("", base)) if one in layers), None)
        if layer is None:
            lone[base] = name
        elif found.setdefault(layer, alpha) != alpha:
            raise UserError(f"{path} has two alphas of one layer: {short(layer)}")
    return found, lone


def _check_lone(
    path: Path, lone: Mapping[str, str], alphas: Mapping[str, float], factors: Mapping[str, Factors]
) -> None:
    """Refuse an alpha that may be of some layers there are, by another name, and says another scale."""
    for base, name in lone.items():
        ours = _plain(base)
        for layer, one in factors.items():
            theirs = [_plain(layer), f"_{layer.replace('.', '_')}_"]
            near = any(whole.startswith(ours) or ours.startswith(whole) for whole in theirs)
            near = near or ours == f"_{one.part}_"
            if near and not math.isclose(alphas[name], one.scale * one.rank, rel_tol=1e-3):
                raise UserError(f"{path} holds {short(name)}, which may be a scale and is not followed")


def _plain(name: str) -> str:
    """A layer's name without its prefix, with underscores for dots, between underscores."""
    return f"_{_split(name)[1].replace('.', '_')}_" if name else ""


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise UserError(f"{path} is damaged: {short(name)} is no finite number")
    return value


def _pairs(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[tuple[str, int | None, str, str]], list[str]]:
    """(layer, chunk, ``A``, ``B``) of each, and the names of all other tensors."""
    sides: dict[tuple[str, int | None], dict[str, str]] = {}
    adapters: set[str | None] = set()
    rest: list[str] = []
    for name in shapes:
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _TENSORS)), None)
        if match is None:
            rest.append(name)
            continue
        said = match.groupdict()
        adapters.add(said.get("adapter"))
        chunk = None if said.get("chunk") is None else int(said["chunk"])
        side = "down" if said["side"] in ("A", "down") else "up"
        both = sides.setdefault((said["layer"], chunk), {})
        if side in both:
            raise UserError(f"{path} holds the factors of {short(said['layer'])} twice")
        both[side] = name
    if len(adapters) > 1:
        raise UserError(f"{path} holds several adapters: give a file with one")
    for both in sides.values():
        if len(both) == 1:
            name = next(iter(both.values()))
            raise UserError(f"{path} is no LoRA of a known layout: {short(name)} has no counterpart")
    return [(layer, chunk, both["down"], both["up"]) for (layer, chunk), both in sides.items()], rest


def _check_rest(path: Path, rest: Sequence[str], some: bool) -> None:
    """Refuse tensors that are not followed; beside factors, nought changes nothing, nor does a scale of 1."""
    for name in rest:
        if not some or bool((tensor_of(path, name).float() != _nothing(name)).any()):
            kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in name), None)
            what = f"{kind} ({short(name)})" if kind else short(name)
            raise UserError(f"{path} is no LoRA of a known layout: it holds {what}, which is not followed")
    if not some:
        raise UserError(f"{path} is no LoRA of a known layout: it holds no lora_A and lora_B, no down and up")


def _nothing(name: str) -> float:
    """The number at which a tensor changes nothing."""
    other = any(mark in name for mark in OTHER_KINDS)
    return 1.0 if _SCALE.search(name) and not other else 0.0


def _factors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    said: Said,
    layer: str,
    chunk: int | None,
    down: str,
    up: str,
) -> Factors:
    a, b = shapes[down], shapes[up]
    if len(a) < 2 or len(b) < 2 or not 0 < a[0] == math.prod(b[1:]) or 0 in (*a, *b):
        what = f"{short(layer)} has factors {list(b)} and {list(a)}"
        raise UserError(f"{path} is a LoRA of another shape than a product's: {what}")
    part, name, flat = _split(layer)
    scale = said.scale(layer, part, name, a[0])
    return Factors(name, part, flat, chunk, down, up, a[0], (b[0], math.prod(a[1:])), scale)


def _split(layer: str) -> tuple[str, str, bool]:
    """Part, name and whether it is flat, of a layer in a file."""
    name = layer.removeprefix("base_model.model.")
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix), prefix.endswith("_")
    return "transformer", name, False


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    few = ", ".join(short(name) for name in names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"
