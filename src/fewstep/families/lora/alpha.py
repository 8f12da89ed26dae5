"""Finds the alpha of a LoRA: in a tensor, in the header, or in a configuration beside the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.lora.header import Value, short, values_of

V = TypeVar("V")

FILE = "pytorch_lora_weights.safetensors"
"""File name that diffusers' ``load_lora_weights`` looks for in a folder."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files that PEFT writes: the tensors, and a ``LoraConfig``."""
HEADER_CONFIG = "lora_adapter_metadata"
"""Where diffusers' trainers write a ``LoraConfig``: in the header, each key with its part in front."""
HEADER_CONFIGS = ("config", "adapter_config", "lora_config", "peft_config")
"""Where else one is followed, if it has ``r`` and ``lora_alpha``."""
KOHYA_ALPHA = "ss_network_alpha"
PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Config:
    """The fields of PEFT's ``LoraConfig`` that set the scale, with PEFT's defaults."""

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
FOLLOWED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA", "PeftType.LORA"),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
"""Fields of which some values change nothing. Other beginnings change the model that an adapter is for."""


def _config(said: Mapping[str, object], where: str) -> Config:
    """A ``LoraConfig`` that can be followed.

    Raises:
        UserError: it cannot, or is damaged.
    """
    ours = Config.__dataclass_fields__.keys()
    for name, value in said.items():
        if name in ours or name in HARMLESS or not value or value in FOLLOWED.get(name, ()):
            continue
        raise UserError(f"{where} sets {short(name)} to {short(str(value))}, which is not followed")
    given = {name: value for name, value in said.items() if name in ours and value is not None}
    config = json_io.convert(given, Config, where)
    numbers = (config.lora_alpha, *config.alpha_pattern.values())
    if min(config.r, *config.rank_pattern.values(), 1) < 1 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{where} is damaged: ranks must be positive, and alphas finite")
    _compiled(tuple(config.rank_pattern), where)
    _compiled(tuple(config.alpha_pattern), where)
    return config


@cache
def _compiled(
    patterns: tuple[str, ...], where: str
) -> tuple[dict[str, int], list[tuple[int, re.Pattern[str]]]]:
    """Plain names of layers with their places, and regular expressions with theirs.

    An expression of a stranger may take for ever: few repetitions, none of a group, on short names alone.
    """
    plain: dict[str, int] = {}
    others: list[tuple[int, re.Pattern[str]]] = []
    for index, pattern in enumerate(patterns):
        if re.fullmatch(r"\^?[\w.-]+", pattern.replace("\\.", ".")):
            plain.setdefault(pattern.replace("\\.", "."), index)
            continue
        repeats = re.sub(r"\\.", "", pattern)
        if len(others) > 8 or len(pattern) > 200 or len(re.findall(r"[*+?{]", repeats)) > 2:
            raise UserError(f"{where}: the pattern {short(pattern)} is not followed")
        try:
            if re.search(r"[)][*+?{]", repeats):
                raise ValueError("repeated groups")
            others.append((index, re.compile(rf"(?:.*\.)?(?:{pattern})$")))
        except (re.error, ValueError, OverflowError, RecursionError):
            raise UserError(f"{where}: the pattern {short(pattern)} is not followed") from None
    return plain, others


def _matching(patterns: Mapping[str, V], names: Iterable[str], where: str) -> V | None:
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
class Said:
    """The alphas in a file, in its header and in the configuration beside it.

    Attributes:
        path: the file.
        alphas: layer -> alpha, from tensors.
        configs: part -> its configuration; that of ``""`` is for all others.
        header: alpha of all layers, from the header.
        where: what errors call the configuration.
        values: of the header that may be scales, and must agree with what is drawn.
        notes: what was assumed, or is not used.
    """

    path: Path
    alphas: Mapping[str, float]
    configs: Mapping[str, Config]
    header: float | None
    where: str
    values: tuple[Value, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(
        path: Path, metadata: Mapping[str, str], alphas: Mapping[str, float], peft: bool, flat: bool
    ) -> Said:
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
            if configs or not (peft or path.name in (PEFT_FILE, FILE)):
                notes.append(f"{beside} is not used, for {path.name} may be another adapter")
            else:
                if not peft:
                    notes.append(f"alpha is taken from {beside}")
                where = str(beside)
                configs = {"": _config(json_io.read(beside, dict[str, Any]), where)}
        elif peft and not configs and not alphas:
            notes.append(f"there is no {PEFT_CONFIG} beside it: alpha is taken to be the rank")
        header = None
        if not alphas and not configs:
            header = _header_alpha(path, metadata) if flat else None
            if header is not None:
                notes.append(f"alpha {header:g} is taken from its header (ss_network_alpha)")
        followed = [HEADER_CONFIG, *_peft_configs(metadata, where)]
        values = values_of(metadata, followed, f"the header of {path}")
        return Said(path, alphas, configs, header, where, tuple(values), tuple(notes))

    def scale(self, layer: str, part: str, name: str, rank: int) -> float:
        """Return the factor of the product ``B A`` of a layer.

        Args:
            layer: the layer's name in the file.
            part: that the name is of.
            name: the same without its prefix.
            rank: of the factors.

        Raises:
            UserError: ranks or alphas contradict each other.
        """
        scales: list[float] = []
        config = self.configs.get(part, self.configs.get(""))
        if config is not None:
            names = (name, name.removeprefix("text_model."))
            said = _matching(config.rank_pattern, names, self.where) or config.r
            alpha = _matching(config.alpha_pattern, names, self.where)
            alpha = config.lora_alpha if alpha is None else alpha
            if said != rank:
                what = f"{short(layer)} has rank {rank}, and {self.where} says {said}"
                raise UserError(f"{self.path} is a LoRA of another shape than is said: {what}")
            scales.append(alpha / (math.sqrt(rank) if config.use_rslora else rank))
        if layer in self.alphas:
            scales.append(self.alphas[layer] / rank)
        if len(scales) == 2 and not math.isclose(*scales, rel_tol=1e-3):
            what = f"a tensor scales {short(layer)} by {scales[1]:g}, and {self.where} by {scales[0]:g}"
            raise UserError(f"{self.path} has two alphas of one layer: {what}")
        if not scales and self.header is not None:
            scales.append(self.header / rank)
        return scales[0] if scales else 1.0


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, Config]:
    """Part -> its configuration, from the header."""
    if HEADER_CONFIG not in metadata:
        configs = [_config(one, where) for one in _peft_configs(metadata, where).values()]
        if any(one != configs[0] for one in configs):
            raise UserError(f"{where} has two configurations that contradict each other")
        return {"": configs[0]} if configs else {}
    said: dict[str, dict[str, object]] = {}
    for key, value in json_io.parse(metadata[HEADER_CONFIG], dict[str, Any], where).items():
        part, dot, name = key.partition(".")
        if dot and part in PARTS:
            said.setdefault(part, {})[name] = value
        else:
            said.setdefault("", {})[key] = value
    return {part: _config(one, where) for part, one in said.items()}


def _peft_configs(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, object]]:
    """Key -> ``LoraConfig``, of keys that are followed where there is no :data:`HEADER_CONFIG`."""
    if HEADER_CONFIG in metadata:
        return {}
    found: dict[str, dict[str, object]] = {}
    for key in HEADER_CONFIGS:
        if metadata.get(key, "").lstrip().startswith("{"):
            said = json_io.parse(metadata[key], dict[str, Any], where)
            if "r" in said and "lora_alpha" in said:
                found[key] = said
    return found


def _header_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """The alpha that kohya's header says, for a file of kohya's names without tensors of it.

    Files under other names may have been converted, and have it in their factors.

    Raises:
        UserError: it is no number.
    """
    if KOHYA_ALPHA not in metadata:
        return None
    try:
        alpha = float(metadata[KOHYA_ALPHA])
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        what = f"{KOHYA_ALPHA} ({short(metadata[KOHYA_ALPHA])})"
        raise UserError(f"the header of {path} says {what}, which may be a scale and is not followed")
    return alpha
