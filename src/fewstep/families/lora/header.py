"""Checks the header of a LoRA for statements about its scale that contradict how it is applied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fewstep.core import json_io
from fewstep.core.types import UserError

MOST_VALUES = 2**17
"""Of all JSON in a header."""
_ROOT = re.compile(r"rs_?lora|rank_?stabili[sz]ed", re.I)
_ALPHA = re.compile(r"alpha", re.I)
_TIMES = re.compile(r"scal(?!ar_type)|strength|multiplier", re.I)
_OF_TRAINING = re.compile(
    r"alphas|alpha_?mask|mask_?alpha|weight_?norm|loss|(?:^|_)lr|learning|noise|guidance|caption|grad|vae|image|"
    r"bucket|upscale|grayscale|sigmoid|timestep|cfg|flow|sigma|optim|scale_parameter|mode_scale|dropout|pred|"
    r"augment|weighting|rope|resolution",
    re.I,
)
"""Keys of trainers that speak of other scales."""
_CAPTIONS = re.compile(r"tag_frequency|dataset|bucket_info|caption|sample_prompts|tags?$|thumbnail", re.I)
"""Keys whose values hold words of captions, names of folders or an image."""
_RANKS = (
    "r",
    "rank",
    "dim",
    "network_dim",
    "network_rank",
    "lora_r",
    "lora_rank",
    "lora_dim",
    "linear",
    "conv",
)
_NOTHING = ("", "none", "null", "false", "no", "off")
_TEXT = re.compile(r"(?P<key>[\w.]*alpha)[\"']?\s*[:=]\s*[\"']?(?P<value>[-+]?[\d.]+(?:e[-+]?\d+)?)", re.I)
"""An alpha in YAML, TOML or Python."""


@dataclass(frozen=True)
class Value:
    """One value of a header that may set a scale.

    Attributes:
        where: keys that lead to it.
        key: its own.
        value: as it stands there.
        rank: that stands beside it; ``None`` where none does.
    """

    where: str
    key: str
    value: object
    rank: float | None

    def agrees(self, scales: Iterable[tuple[float, int]]) -> bool:
        """Whether layers that are drawn at ``(scale, rank)`` are as it says, or it says nothing."""
        text = str(self.value).strip().lower()
        if text in _NOTHING:
            return True
        number = _number(self.value)
        if _ROOT.search(self.key):
            return number == 0
        if number is None:
            return False
        if _ALPHA.search(self.key):
            ratio = number / self.rank if self.rank else None
            return all(_close(number, scale * rank) or _close(ratio, scale) for scale, rank in scales)
        return number == 1 or all(_close(number, scale) for scale, _ in scales)


def check(
    path: Path, values: Iterable[Value], scales: Iterable[tuple[float, int]], informs: bool = False
) -> None:
    """Compare what a header says with what is drawn.

    Args:
        path: the file.
        values: of its header.
        scales: scale and rank of each layer.
        informs: whether ``ss_`` keys only inform: kohya's own tensors of alpha hold what it trained with.

    Raises:
        UserError: it says another scale, or what cannot be compared.
    """
    scales = list(scales)
    for value in values:
        if (informs and value.where.startswith("ss_")) or value.agrees(scales):
            continue
        what = f"{short(value.where)} ({short(str(value.value))})"
        raise UserError(f"the header of {path} says {what}, which may be a scale and is not followed")


def values_of(metadata: Mapping[str, str], followed: Iterable[str], where: str) -> list[Value]:
    """All values of a header that may set a scale.

    Args:
        metadata: of the header.
        followed: keys of it that are followed already.
        where: what errors call it.

    Raises:
        UserError: there are too many values.
    """
    left = {key: text for key, text in metadata.items() if key not in set(followed)}
    return list(_scale_values(left, where))


def _scale_values(metadata: Mapping[str, str], where: str) -> Iterator[Value]:
    todo: list[tuple[str, str, object, float | None]] = [("", "", dict(metadata), None)]
    for _ in range(MOST_VALUES):
        if not todo:
            return
        path, key, value, rank = todo.pop()
        value = _json(value, where)
        if isinstance(value, Mapping):
            inner = cast(Mapping[str, object], value)
            for name, each in inner.items():
                name = str(name)
                if not _CAPTIONS.search(name):
                    # A pattern's keys are layers: it is its own key that says what the values are.
                    own = key if key.lower().endswith("pattern") else name
                    todo.append((f"{path}.{name}".lstrip("."), own, each, _rank(inner, name)))
        elif isinstance(value, list):
            todo += [(path, key, each, rank) for each in cast(list[object], value)]
        else:
            yield from _leaf(path, key, value, rank)
    raise UserError(f"{where} holds more than {MOST_VALUES} values")


def _leaf(path: str, key: str, value: object, rank: float | None) -> Iterator[Value]:
    if _speaks(key):
        yield Value(path, key, value, rank)
    elif isinstance(value, str):
        for match in _TEXT.finditer(value[: 10**6]):
            if _speaks(match["key"]):
                yield Value(f"{path}.{match['key']}".lstrip("."), match["key"], match["value"], None)


def _speaks(key: str) -> bool:
    if _ROOT.search(key):
        return True
    return bool(_ALPHA.search(key) or _TIMES.search(key)) and not _OF_TRAINING.search(key)


def _json(value: object, where: str) -> object:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json_io.parse(value, Any, where)
        except UserError:  # text of another kind
            return value
    return value


def _rank(inner: Mapping[str, object], key: str) -> float | None:
    """The rank beside an alpha: of the same layers, as ``conv_dim`` is beside ``conv_alpha``, or of all."""
    if not _ALPHA.search(key):
        return None
    stem = key[: key.lower().index("alpha")].strip("_")
    own = (stem, f"{stem}_dim", f"{stem}_rank", f"{stem}_r") if stem else ()
    ranks = [_number(inner[name]) for name in (*own, *_RANKS, "ss_network_dim") if name in inner]
    return next((rank for rank in ranks if rank and rank > 0), None)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _close(one: float | None, other: float) -> bool:
    return one is not None and math.isclose(one, other, rel_tol=1e-3)


def short(name: str) -> str:
    """A name of a stranger, fit for a line."""
    plain = "".join(sign if sign.isprintable() else "?" for sign in name[:121])
    return plain if len(name) <= 120 else f"{plain[:117]}..."
