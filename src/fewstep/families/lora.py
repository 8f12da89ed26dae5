"""LoRA adapters in the layouts of diffusers, PEFT, kohya and ComfyUI (floor 2).

An adapter adds ``scale B A`` to the weight of a layer (Hu et al., arXiv 2106.09685), with ``A [r, in]``,
``B [out, r]`` and ``scale = alpha / r``. Layouts differ in what they call a layer, in whether three
projections are one layer, and in where alpha stands: in a tensor, in the header, in a file beside.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep import formats
from fewstep.families.folder import first_line
from fewstep.families.original_names import layer_table, swapped
from fewstep.types import UserError

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers' ``load_lora_weights`` looks for in a folder."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What PEFT writes: the tensors, and a ``LoraConfig``."""
HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers' trainers write a ``LoraConfig``: in the header, each key with its part in front."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
CHUNK = 2**22
"""Numbers of a weight that are added to at once: float32 copies are of so many, and not of the layer."""

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
_ALPHA = ".alpha"

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

PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
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
"""What stands before a layer's name -> its part; kohya and ComfyUI number text encoders by their kind."""
_ENCODERS = {
    "sd3": {
        "te1": "text_encoder",
        "te2": "text_encoder_2",
        "te3": "text_encoder_3",
        "clip_g": "text_encoder_2",
    },
    "flux": {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"},
}

_MARKS = (
    ("a U-Net (SD 1.5 or SDXL)", r"(down|up)_blocks|mid_block|(in|out)put_blocks|middle_block"),
    ("flux", r"(double|single)_blocks|single_transformer_blocks"),
    ("sd3", r"joint_blocks|[._]attn2[._]|pos_embed"),
    ("Wan", r"blocks[._]\d+[._](self|cross)_attn"),
    ("Qwen-Image", r"(img|txt)_mod"),
    ("PixArt or LTX", r"adaln_single|caption_projection"),
)
"""Whose layers they are -> how their names are known."""


class LoraWarning(UserWarning):
    """Something of a LoRA is not used, or had to be assumed."""


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
    scale: float = 1.0


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


@dataclass(frozen=True)
class Update:
    """What is added to one layer of a model: ``scale B[rows] A``, the rows' halves swapped if need be."""

    path: Path
    down: str
    up: str
    scale: float
    rows: tuple[int, int]
    swap: bool = False

    def read(self) -> tuple[Tensor, Tensor]:
        """``scale B [out, r]`` and ``A [r, in]``, float32.

        Raises:
            UserError: they cannot be read, or are no finite numbers.
        """
        import torch

        up, down = (tensor_of(self.path, name).float().flatten(1) for name in (self.up, self.down))
        up = self.scale * up[slice(*self.rows)]
        if not (up.isfinite().all() and down.isfinite().all()):
            raise UserError(f"{self.path} holds NaN or infinity in {_short(self.down)} or its counterpart")
        return torch.cat(up.chunk(2)[::-1]) if self.swap else up, down


Updates = Mapping[str, Sequence[Update]]
"""Layer -> what is added to its weight."""
Shapes = Mapping[str, tuple[int, int]]
"""Layer -> the shape of its weight, ``[out, in]`` (:func:`shapes_of`)."""


def added(weight: Tensor, updates: Sequence[Update], dtype: Any) -> Tensor:
    """A weight with updates added in float32, then rounded to ``dtype``.

    Args:
        weight: ``[out, in]``, or a convolution's ``[out, in, h, w]``; written over where it is of ``dtype``.
        updates: in the order in which they are added.
        dtype: torch dtype of the result.

    Raises:
        UserError: see :meth:`Update.read`.
    """
    import torch

    pairs = [update.read() for update in updates]
    result = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    old, new = weight.flatten(1), result.flatten(1)
    rows = max(1, CHUNK // old.shape[1])
    for begin in range(0, len(old), rows):
        few = slice(begin, begin + rows)
        total = old[few].float()
        for up, down in pairs:
            total = total + up[few] @ down
        new[few] = total.to(dtype)
    return result


def find(place: Path, option: str = "--lora") -> Path:
    """The ``.safetensors`` file of a LoRA: a file, or in a folder or run what diffusers or PEFT write.

    Raises:
        UserError: there is none, or several.
    """
    try:
        if place.is_file():
            if place.suffix != ".safetensors":
                raise UserError(f"{option} {place}: only .safetensors files are read")
            return place
        for name in (FILE, PEFT_FILE, f"lora/{FILE}"):
            if (place / name).is_file():
                return place / name
        found = sorted(place.glob("*.safetensors"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {place} cannot be read: {first_line(error)}") from None
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{option} {place} holds several .safetensors files: name one, such as {found[0]}")
    if place.exists():
        raise UserError(f"{option} {place} holds no LoRA: neither {FILE} nor {PEFT_FILE} is in it")
    raise UserError(f"there is no LoRA {place}: give a .safetensors file, or a folder with one")


# --- a file ---


@contextmanager
def _opened(path: Path) -> Generator[Any]:
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
        alphas = {
            name.removesuffix(_ALPHA): _alpha(path, name, file.get_tensor(name))
            for name in shapes
            if name.endswith(_ALPHA)
        }
    pairs, rest = _pairs(path, shapes)
    _check_rest(path, [name for name in rest if not name.endswith(_ALPHA)], bool(pairs))
    odd = [name for pair in pairs for name in pair[2:] if kinds[name] not in FLOATS]
    if odd:
        raise UserError(f"{path} holds {_short(odd[0])} as {kinds[odd[0]]}: only floats are read")
    peft = any(layer.startswith("base_model.model.") for layer, *_ in pairs)
    said = _Said.of(path, metadata, alphas, peft, any(_split(layer)[2] for layer, *_ in pairs))
    factors = tuple(said.scaled(_factors(path, shapes, *pair), pair[0]) for pair in pairs)
    layers = {layer for layer, *_ in pairs}
    lone = sorted(name for name in alphas if name not in layers)
    left = [f"the alpha of {_listed(lone)}, of which there are no factors"] if lone else []
    return Lora(path, factors, (*said.notes, *left))


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise UserError(f"{path} is damaged: {_short(name)} is no finite number")
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
            raise UserError(f"{path} holds the factors of {_short(said['layer'])} twice")
        both[side] = name
    if len(adapters) > 1:
        raise UserError(f"{path} holds several adapters: give a file with one")
    for both in sides.values():
        if len(both) == 1:
            name = next(iter(both.values()))
            raise UserError(f"{path} is no LoRA of a known layout: {_short(name)} has no counterpart")
    return [(layer, chunk, both["down"], both["up"]) for (layer, chunk), both in sides.items()], rest


def _check_rest(path: Path, rest: Sequence[str], some: bool) -> None:
    """Refuse tensors that are not followed; where there are factors beside, nought changes nothing."""
    for name in rest:
        if not some or bool(tensor_of(path, name).float().count_nonzero()):
            kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in name), None)
            what = f"{kind} ({_short(name)})" if kind else _short(name)
            raise UserError(f"{path} is no LoRA of a known layout: it holds {what}, which is not followed")
    if not some:
        raise UserError(f"{path} is no LoRA of a known layout: it holds no lora_A and lora_B, no down and up")


def _factors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], layer: str, chunk: int | None, down: str, up: str
) -> Factors:
    a, b = shapes[down], shapes[up]
    if len(a) < 2 or len(b) < 2 or not 0 < a[0] == math.prod(b[1:]) or 0 in (*a, *b):
        what = f"{_short(layer)} has factors {list(b)} and {list(a)}"
        raise UserError(f"{path} is a LoRA of another shape than a product's: {what}")
    part, name, flat = _split(layer)
    return Factors(name, part, flat, chunk, down, up, a[0], (b[0], math.prod(a[1:])))


def _split(layer: str) -> tuple[str, str, bool]:
    """Part, name and whether it is flat, of a layer in a file."""
    name = layer.removeprefix("base_model.model.")
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix), prefix.endswith("_")
    return "transformer", name, False


# --- alpha ---


@dataclass(frozen=True)
class Config:
    """What of PEFT's ``LoraConfig`` sets the scale; its defaults are PEFT's."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    use_rslora: bool = False


HARMLESS = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules lora_dropout fan_in_fan_out layers_to_transform layers_pattern megatron_core "
    "eva_config qalora_group_size runtime_config ensure_weight_tying".split()
)
"""Fields of a ``LoraConfig`` that say how an adapter was trained or where it lies, and change no product."""
FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "PeftType.LORA"),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
"""Fields of which some values change nothing. Other beginnings change the model that an adapter is for."""


def _config(said: Mapping[str, Any], where: str) -> Config:
    """A ``LoraConfig`` that can be followed.

    Raises:
        UserError: it cannot, or is damaged.
    """
    ours = Config.__dataclass_fields__.keys()
    for name, value in said.items():
        if name in ours or name in HARMLESS or not value or value in FOLLOWED.get(name, ()):
            continue
        raise UserError(f"{where} sets {_short(name)} to {_short(str(value))}, which is not followed")
    given = {name: value for name, value in said.items() if name in ours and value is not None}
    config = formats.convert(given, Config, where)
    numbers = (config.lora_alpha, *config.alpha_pattern.values())
    if min(config.r, *config.rank_pattern.values(), 1) < 1 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where} is damaged: ranks must be positive, and alphas finite")
    _compiled(tuple(config.rank_pattern), where)
    _compiled(tuple(config.alpha_pattern), where)
    return config


@cache
def _compiled(patterns: tuple[str, ...], where: str) -> tuple[dict[str, int], list[tuple[int, Any]]]:
    """Plain names of layers with their places, and regular expressions with theirs.

    An expression of a stranger may take for ever: few repetitions, none of a group, on short names alone.
    """
    plain: dict[str, int] = {}
    others: list[tuple[int, Any]] = []
    for index, pattern in enumerate(patterns):
        if re.fullmatch(r"\^?[\w.-]+", pattern.replace("\\.", ".")):
            plain.setdefault(pattern.replace("\\.", "."), index)
            continue
        repeats = re.sub(r"\\.", "", pattern)
        if len(others) > 8 or len(pattern) > 200 or len(re.findall(r"[*+?{]", repeats)) > 2:
            raise UserError(f"{where}: the pattern {_short(pattern)} is not followed")
        try:
            if re.search(r"[)][*+?{]", repeats):
                raise ValueError("repeated groups")
            others.append((index, re.compile(rf"(?:.*\.)?(?:{pattern})$")))
        except (re.error, ValueError, OverflowError, RecursionError):
            raise UserError(f"{where}: the pattern {_short(pattern)} is not followed") from None
    return plain, others


def _matching(patterns: Mapping[str, Any], names: Iterable[str], where: str) -> Any:
    """The value of the first pattern that matches one of a layer's names, as PEFT looks it up."""
    keys = tuple(patterns)
    plain, others = _compiled(keys, where)
    for name in names:
        steps = name.split(".")
        ends = [".".join(steps[i:]) for i in range(len(steps))]
        found = [plain[end] for end in (*ends, f"^{name}") if end in plain]
        found += [index for index, pattern in others if len(name) <= 100 and pattern.match(name)]
        if found:
            return patterns[keys[min(found)]]
    return None


@dataclass(frozen=True)
class _Said:
    """What a file, its header and the configuration beside it say of alpha.

    Attributes:
        path: the file.
        alphas: layer -> alpha, from tensors.
        configs: part -> its configuration; that of ``""`` is for all others.
        header: alpha of all layers, from the header.
        where: what errors call the configuration.
        notes: what was assumed, or is not used.
    """

    path: Path
    alphas: Mapping[str, float]
    configs: Mapping[str, Config]
    header: float | None
    where: str
    notes: tuple[str, ...]

    @staticmethod
    def of(
        path: Path, metadata: Mapping[str, str], alphas: Mapping[str, float], peft: bool, flat: bool
    ) -> _Said:
        """Read them.

        Args:
            path: the file.
            metadata: of its header.
            alphas: layer -> alpha, from its tensors.
            peft: whether its names are PEFT's.
            flat: whether its names are kohya's.

        Raises:
            UserError: they are damaged, contradict each other, or cannot be followed.
        """
        notes: list[str] = []
        beside = path.parent / PEFT_CONFIG
        where = f"the header of {path}"
        configs = _configs(metadata, where)
        if beside.is_file():
            if configs or not (peft or path.name == PEFT_FILE):
                notes.append(f"{beside} is not used, for the tensors are not in PEFT's layout")
            else:
                where = str(beside)
                configs = {"": _config(formats.read(beside, dict[str, Any]), where)}
        elif peft and not configs and not alphas:
            notes.append(f"there is no {PEFT_CONFIG} beside it: alpha is taken to be the rank")
        header = None
        if not alphas and not configs:
            header = _header_alpha(path, metadata, flat)
            if header is not None:
                notes.append(f"alpha {header:g} is taken from its header (ss_network_alpha)")
            notes += _unused(metadata, flat)
        return _Said(path, alphas, configs, header, where, tuple(notes))

    def scaled(self, factors: Factors, layer: str) -> Factors:
        """Factors with their scale.

        Args:
            factors: of a layer.
            layer: the layer's name in the file.

        Raises:
            UserError: ranks or alphas contradict each other.
        """
        scales: list[float] = []
        config = self.configs.get(factors.part, self.configs.get(""))
        if config is not None:
            names = (factors.name, factors.name.removeprefix("text_model."))
            rank = _matching(config.rank_pattern, names, self.where) or config.r
            alpha = _matching(config.alpha_pattern, names, self.where)
            alpha = config.lora_alpha if alpha is None else alpha
            if rank != factors.rank:
                what = f"{_short(layer)} has rank {factors.rank}, and {self.where} says {rank}"
                raise UserError(f"{self.path} is a LoRA of another shape than is said: {what}")
            scales.append(alpha / (math.sqrt(rank) if config.use_rslora else rank))
        if layer in self.alphas:
            scales.append(self.alphas[layer] / factors.rank)
        if len(scales) == 2 and not math.isclose(*scales, rel_tol=1e-3):
            what = f"a tensor scales {_short(layer)} by {scales[1]:g}, and {self.where} by {scales[0]:g}"
            raise UserError(f"{self.path} has two alphas of one layer: {what}")
        if not scales and self.header is not None:
            scales.append(self.header / factors.rank)
        return Factors(**{**vars(factors), "scale": scales[0] if scales else 1.0})


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, Config]:
    """Part -> its configuration, from the header."""
    if HEADER_CONFIG not in metadata:
        return {}
    said: dict[str, dict[str, Any]] = {}
    for key, value in formats.parse(metadata[HEADER_CONFIG], dict[str, Any], where).items():
        part, dot, name = key.partition(".")
        if dot and part in PARTS:
            said.setdefault(part, {})[name] = value
        else:
            said.setdefault("", {})[key] = value
    return {part: _config(one, where) for part, one in said.items()}


def _header_alpha(path: Path, metadata: Mapping[str, str], flat: bool) -> float | None:
    """The alpha that kohya's header says, for a file without tensors of it.

    Files under other names were converted, and have it in their factors.

    Raises:
        UserError: something else there may be an alpha.
    """
    odd = [key for key in metadata if not key.startswith("ss_") and re.search("alpha|scal", key, re.I)]
    if flat and "ss_network_alpha" in metadata:
        odd += ["ss_network_args"] if "alpha" in metadata.get("ss_network_args", "") else []
        try:
            alpha = float(metadata["ss_network_alpha"])
        except ValueError:
            alpha = math.nan
        if not math.isfinite(alpha):
            odd.append("ss_network_alpha")
    else:
        alpha = None
    if odd:
        what = f"{_short(odd[0])} ({_short(metadata[odd[0]])})"
        raise UserError(f"the header of {path} says {what}, which may be a scale and is not followed")
    return alpha


def _unused(metadata: Mapping[str, str], flat: bool) -> list[str]:
    """What in a header speaks of alpha and is not used."""
    found = [key for key, text in metadata.items() if not key.startswith("ss_") and "lora_alpha" in text]
    if not flat and metadata.get("ss_network_alpha") != metadata.get("ss_network_dim"):
        found.append("ss_network_alpha")
    return [f"{_short(key)} in its header is not used, and alpha is taken to be the rank" for key in found]


# --- a model ---


def shapes_of(net: Any) -> dict[str, tuple[int, int]]:
    """Layers of a net that an adapter may change, with the shapes of their weights, ``[out, in]``; of a
    convolution ``in`` counts the kernel."""
    import torch

    return {
        path: (layer.weight.shape[0], math.prod(layer.weight.shape[1:]))
        for path, layer in net.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }


def resolve(
    lora: Lora, kind: str, shapes: Callable[[str], Shapes | None], weight: float = 1.0
) -> tuple[dict[str, dict[str, Update]], list[str]]:
    """What a LoRA adds to a model.

    Args:
        lora: the adapter.
        kind: family of the model, ``sd3`` or ``flux``.
        shapes: part -> its layers; ``None`` where the model has no such part.
        weight: the adapter's.

    Returns:
        Part -> layer -> what is added to it, and names of layers that the model has not.

    Raises:
        UserError: it is another model's: of another family, of other shapes, or without any layer of this.
    """
    updates: dict[str, dict[str, Update]] = {}
    left: list[tuple[str, Factors]] = []
    nets: dict[str, _Names | None] = {}
    for factors in lora.factors:
        part = _ENCODERS[kind].get(factors.part, factors.part)
        if part not in nets:
            layers = shapes(part)
            nets[part] = None if layers is None else _Names.of(part, kind, layers)
        net = nets[part]
        layers = None if net is None else net.find(factors)
        if net is None or layers is None:
            left.append((part, factors))
            continue
        for layer, update in net.updates(lora.path, factors, layers, weight).items():
            if layer in updates.setdefault(part, {}):
                raise UserError(f"{lora.path} adds to {layer} twice, the second time as {factors.down}")
            updates[part][layer] = update
    _check_family(lora.path, kind, [factors.name for part, factors in left if part == "transformer"])
    if not updates:
        names = ", ".join(_short(factors.down) for _, factors in left[:1])
        raise UserError(f"{lora.path} is a LoRA of another net: the model has no layer of it, such as {names}")
    return updates, [factors.down.removesuffix(".weight") for _, factors in left]


def _check_family(path: Path, kind: str, names: Sequence[str]) -> None:
    for name in names:
        family = next((family for family, mark in _MARKS if re.search(mark, name)), kind)
        if family != kind:
            raise UserError(
                f"{path} is a LoRA of another net: it looks like one for {family} ({_short(name)}), "
                f"and the model is of the family {kind}"
            )


@dataclass(frozen=True)
class _Names:
    """How files call the layers of one net.

    Attributes:
        shapes: of its layers.
        names: name in a file -> the layers that it means.
        swap: names whose rows' halves are the other way round.
    """

    shapes: Shapes
    names: Mapping[str, tuple[str, ...]]
    swap: frozenset[str]

    @staticmethod
    def of(part: str, kind: str, shapes: Shapes) -> _Names:
        if part != "transformer":
            names = {layer.removeprefix("text_model."): (layer,) for layer in shapes}
            olds = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
            for name, layers in list(names.items()):
                front, _, last = name.rpartition(".")
                names.setdefault(f"{front}.{olds.get(last, last)}", layers)
            return _Names(shapes, _flattened(names), frozenset())
        theirs = {
            name: layers
            for name, layers in layer_table(kind, shapes).items()
            if all(layer in shapes for layer in layers)
        }
        names = theirs | {layer: (layer,) for layer in shapes}
        names |= _xlabs(theirs) | _processors(shapes)
        swap = {name for name in swapped(kind, shapes) if name in names}
        return _Names(shapes, _flattened(names), frozenset(swap | {n.replace(".", "_") for n in swap}))

    def find(self, factors: Factors) -> tuple[str, ...] | None:
        name = factors.name.removeprefix("text_model_" if factors.flat else "text_model.")
        layers = self.names.get(name)
        if layers is None or factors.chunk is None:
            return layers
        return layers[factors.chunk : factors.chunk + 1] or None

    def updates(
        self, path: Path, factors: Factors, layers: Sequence[str], weight: float
    ) -> dict[str, Update]:
        """Of each of the layers that ``factors`` mean.

        Raises:
            UserError: they have other shapes.
        """
        ours = [self.shapes[layer] for layer in layers]
        if factors.shape != (sum(out for out, _ in ours), ours[0][1]):
            what = f"{', '.join(layers)}: {list(map(list, ours))}, the LoRA has {list(factors.shape)}"
            raise UserError(f"{path} is a LoRA of another shape: {what}")
        swap = factors.name in self.swap
        found: dict[str, Update] = {}
        begin = 0
        for layer, (out, _) in zip(layers, ours, strict=True):
            rows = (begin, begin + out)
            found[layer] = Update(path, factors.down, factors.up, weight * factors.scale, rows, swap)
            begin += out
        return found


def _flattened(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The names, and the same with underscores for dots."""
    return {name.replace(".", "_"): layers for name, layers in names.items()} | dict(names)


def _xlabs(theirs: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """XLabs' names of FLUX's attention."""
    ends = {
        "img_attn.qkv": "processor.qkv_lora1",
        "img_attn.proj": "processor.proj_lora1",
        "txt_attn.qkv": "processor.qkv_lora2",
        "txt_attn.proj": "processor.proj_lora2",
    }
    found: dict[str, tuple[str, ...]] = {}
    for name, layers in theirs.items():
        for end, other in ends.items():
            if name.startswith("double_blocks.") and name.endswith(end):
                found[name.removesuffix(end) + other] = layers
        if name.startswith("single_blocks.") and name.endswith("linear1"):
            found[name.removesuffix("linear1") + "processor.qkv"] = layers[:3]
        if name.startswith("single_blocks.") and name.endswith("linear2"):
            found[name.removesuffix("linear2") + "processor.proj"] = layers
    return found


def _processors(shapes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Old diffusers' names of attention, where a LoRA was an attention processor."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in shapes:
        front, attn, end = layer.rpartition(".attn.")
        if attn:
            found[f"{front}.attn.{end.removesuffix('.0')}"] = (layer,)
            found[f"{front}.attn.processor.{end.removesuffix('.0')}"] = (layer,)
    return found


# --- what somebody asks for ---


def parsed(spec: str) -> tuple[str, float]:
    """``FILE[:WEIGHT]`` -> the file and the adapter's weight, 1 where none is given.

    What follows the last colon is a weight where it is a number and the rest is there; a file whose own name
    ends so needs a weight after it.

    Raises:
        UserError: no file is named, or the weight is no finite number.
    """
    name, colon, last = spec.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    there = _there(spec)
    if weight is None:
        if name and not there and _there(name):
            raise UserError(f"--lora {spec}: the weight must be a number, such as {name}:0.8")
        name, weight = spec, 1.0
    elif there and not _there(name):
        name, weight = spec, 1.0
    if not name:
        raise UserError("--lora must name a .safetensors file, or a folder with one")
    if not math.isfinite(weight):
        raise UserError(f"--lora {spec}: the weight must be a finite number, such as {name}:0.8")
    return name, weight


def _there(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def specs(given: Any) -> tuple[str, ...]:
    """What Python or a command line gives for LoRAs as ``FILE:WEIGHT`` each, the weight always said.

    Args:
        given: ``None``, a ``FILE[:WEIGHT]``, or several, each that or a pair of file and weight.

    Raises:
        UserError: see :func:`parsed`.
    """
    if given is None:
        return ()
    many = [given] if isinstance(given, str | Path) else list(given)
    if len(many) == 2 and isinstance(many[1], int | float):
        many = [tuple(many)]
    found: list[str] = []
    for one in many:
        if isinstance(one, str):
            name, weight = parsed(one)
        elif isinstance(one, Path):
            name, weight = str(one), 1.0
        else:
            name, weight = _pair(one)
        found.append(f"{name}:{weight!r}")
    return tuple(found)


def _pair(one: Any) -> tuple[str, float]:
    try:
        name, weight = one
        weight = float(weight)
    except (TypeError, ValueError):
        name, weight = None, math.nan
    if not isinstance(name, str | Path) or not math.isfinite(weight):
        raise UserError(f"lora must be FILE[:WEIGHT] or (file, weight), not {str(one)[:40]}")
    return str(name), weight


def updates_of(
    given: Sequence[str], kind: str, shapes: Callable[[str], Shapes | None]
) -> dict[str, dict[str, list[Update]]]:
    """What several LoRAs add to a model; what cannot be used of them is warned of.

    Args:
        given: ``FILE[:WEIGHT]`` of each.
        kind: family of the model.
        shapes: see :func:`resolve`.

    Returns:
        Part -> layer -> what is added, in the order of the LoRAs. One of weight 0 adds nothing.

    Raises:
        UserError: one of them is missing, damaged, foreign or not followed.
    """
    shapes = cache(shapes)
    total: dict[str, dict[str, list[Update]]] = {}
    for spec in given:
        name, weight = parsed(spec)
        lora = read(find(Path(name)))
        updates, left = resolve(lora, kind, shapes, weight)
        for note in lora.notes:
            warnings.warn(f"{lora.path}: {note}", LoraWarning, stacklevel=2)
        if left:
            text = f"{lora.path}: left out what the model has no layer for: {_listed(left)}"
            warnings.warn(text, LoraWarning, stacklevel=2)
        for part, layers in updates.items():
            for layer, update in layers.items() if weight else ():
                total.setdefault(part, {}).setdefault(layer, []).append(update)
    return total


def apply(parts: Mapping[str, Any], kind: str, given: Sequence[str]) -> None:
    """Add LoRAs to the nets of a model that is in memory, in place.

    Args:
        parts: components by their diffusers names; ``None`` for what is absent.
        kind: family of the model.
        given: ``FILE[:WEIGHT]`` of each.

    Raises:
        UserError: see :func:`updates_of`.
    """
    import torch

    def shapes(part: str) -> Shapes | None:
        return None if parts.get(part) is None else shapes_of(parts[part])

    with torch.no_grad():
        for part, layers in updates_of(given, kind, shapes).items():
            for layer, updates in layers.items():
                weight = parts[part].get_submodule(layer).weight
                weight.copy_(added(weight.detach().cpu().contiguous(), updates, weight.dtype))


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(_short(name) for name in names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:117]}..."
