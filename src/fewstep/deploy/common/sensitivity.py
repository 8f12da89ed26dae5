"""Which weights must not lose bits: measured, one at a time, on real prompts (floor 3).

A weight is stored in few bits and read back while all others stay as they are; how far the outputs of its
graph move, on what reaches the graph in real walks, is what it costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fewstep import sample, times
from fewstep.deploy.common.graphs import Part
from fewstep.deploy.common.weights import SMALLEST, approximate
from fewstep.families import Family

Inputs = Sequence[Mapping[str, Any]]
"""What a graph is called with, by the names of its inputs, once each."""


@dataclass(frozen=True)
class Weight:
    """A weight and what its loss of bits costs.

    Attributes:
        name: in its graph.
        size: elements.
        error: squared change of the graph's outputs over their square.
        digest: of its values (:func:`digest`).
    """

    name: str
    size: int
    error: float
    digest: str


def real_inputs(family: Family, parts: Mapping[str, Part], prompts: Sequence[str]) -> dict[str, Inputs]:
    """What reaches every graph when ``family`` draws these prompts, seed ``i`` for prompt ``i``."""
    import torch

    rows = len(prompts)
    with torch.no_grad():
        ids = family.parts["tokenizer"](
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=parts["text"].inputs["tokens"].shape[1],
        ).input_ids  # fmt: skip
        context, pooled = parts["text"].module(ids)
        x = family.lift(sample.noises(range(rows), family.latent))
        grid = times.grid(family.steps, family.shift)
        modulated: list[dict[str, Any]] = []
        stepped: list[dict[str, Any]] = []
        for t, t_next in pairwise(grid):
            modulated.append({"t": torch.full((rows,), t), "pooled": pooled})
            modulation = parts["modulation"].module(**modulated[-1])
            stepped.append({"x": x, "context": context, "modulation": modulation})
            x = sample.euler(x, parts["transformer"].module(**stepped[-1]), t, t_next, 0)
        images = parts["decoder"].module(x)
    return {
        "text": [{"tokens": ids}],
        "modulation": modulated,
        "transformer": stepped,
        "decoder": [{"latents": x}],
        "encoder": [{"images": images}],
    }


def sensitivity(part: Part, inputs: Inputs, bits: int, told: Callable[[str], object] = str) -> list[Weight]:
    """Every weight of a graph that is stored in ``bits``, the one that costs most an element first.

    Args:
        part: the graph, as a module.
        inputs: what reaches it (:func:`real_inputs`).
        bits: a weight.
        told: hears the name of each weight before it is measured.
    """
    whole, found = _outputs(part, inputs), list[Weight]()
    square = sum(float(out.square().sum()) for out in whole)
    seen: set[int] = set()
    for name, parameter in [*part.module.named_parameters(), *part.module.named_buffers()]:
        if parameter.numel() < SMALLEST or not parameter.is_floating_point() or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        told(name)
        array = parameter.detach().numpy().copy()
        with _replaced(parameter, approximate(array, bits)):
            moved = zip(_outputs(part, inputs), whole, strict=True)
            error = sum(float((ours - theirs).square().sum()) for ours, theirs in moved)
        found.append(Weight(name, array.size, error / square, digest(array)))
    return sorted(found, key=lambda weight: weight.error / weight.size, reverse=True)


def spared(weights: Sequence[Weight], share: float) -> dict[str, float]:
    """The weights to keep, the costliest an element first, until they are ``share`` of all elements.

    Returns:
        Digest -> error of each.
    """
    room = share * sum(weight.size for weight in weights)
    kept: dict[str, float] = {}
    for weight in weights:
        if weight.size <= room:
            kept[weight.digest] = weight.error
            room -= weight.size
    return kept


def digest(array: np.ndarray) -> str:
    """The same for a matrix and its transpose: an exporter turns some."""
    turned = [array, array.T] if array.ndim == 2 else [array]
    return min(hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for each in turned)


def _outputs(part: Part, inputs: Inputs) -> list[Any]:
    import torch

    made: list[Any] = []
    with torch.no_grad():
        for told in inputs:
            out = part.module(**told)
            made += out if isinstance(out, tuple) else [out]
    return made


@contextmanager
def _replaced(parameter: Any, array: np.ndarray) -> Generator[None]:
    import torch

    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(array))
        try:
            yield
        finally:
            parameter.copy_(kept)
