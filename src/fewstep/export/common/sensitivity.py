"""Which weights need their bits: measured, one at a time, on real prompts.

A weight is stored in few bits and read back while all others stay as they are. How far that moves the
pictures that whole walks end with (of the encoder: its latents) is what it costs. A storage budget is then
spent where it saves most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fewstep.core import sampling, schedule
from fewstep.core.types import Cond
from fewstep.export.common.calibration import CalibrationStats, collect_stats
from fewstep.export.common.graphs import GraphSpec
from fewstep.export.common.onnx_quantize import GROUP, SMALLEST, QuantSpec, quantize_dequantize
from fewstep.families.base import Family

WIDTHS = (2, 3, 4, 5, 6, 8, 16)
"""Bits that a weight may get."""

HELD = {8: 8.5, 6: 6.4, 4: 4.75}
"""Bits a weight that a rung takes, scales included: about what GGUF's Q8_0, Q6_K and Q4_K take (8.5, 6.6, 4.5
to 4.9). Any other rung takes its own and a scale a group."""

MEASURED = 4
"""Bits whose cost is measured; a small error's square passes through a net in proportion, so that of the
others follows from the squared error of the layer's outputs, or of the weight itself where its inputs are not
known."""

PIXELS = 16 * 128 * 128
"""Drawn at a time in calibration: a decoder holds some 4 kB for each."""

APART = 1000
"""First seed of calibration: no other measure draws its pictures."""


@dataclass(frozen=True)
class WeightSensitivity:
    """A weight, what it takes and what it costs.

    Attributes:
        graph: where it is.
        name: there.
        size: elements.
        digest: of its values (:func:`digest`).
        bytes: that it takes, by bits.
        errors: what its loss of bits costs, by bits: squared change of what comes out over its variance.
    """

    graph: str
    name: str
    size: int
    digest: str
    bytes: Mapping[int, int]
    errors: Mapping[int, float]


def reference_outputs(
    family: Family, parts: Mapping[str, GraphSpec], prompts: Sequence[str], seed: int = 0
) -> dict[str, Callable[[], Any]]:
    """For every graph, what comes out when all weights are as they are now: tensors ``[B, ...]``.

    Prompt ``i`` is drawn with seed ``seed + i``, by Euler steps without guidance.
    """
    import torch

    rows, run = len(prompts), {stem: part.module for stem, part in parts.items()}
    ids = family.parts["tokenizer"](
        list(prompts), padding="max_length", truncation=True, return_tensors="pt",
        max_length=parts["text"].inputs["tokens"].shape[1],
    ).input_ids  # fmt: skip
    grid = schedule.grid(family.steps, family.shift)

    def velocity(x_t: Any, t: Any, cond: Cond) -> Any:
        modulation = run["modulation"](t=t, pooled=cond.pooled)
        return run["transformer"](x=x_t, context=cond.context, modulation=modulation)

    def generate(context: Any, pooled: Any) -> Any:
        cond, seeds = Cond(context, pooled), range(seed, seed + rows)
        return sampling.generate_latents(family, cond, seeds, grid, velocity=velocity, sampler="euler")

    def decoded(context: Any, pooled: Any) -> Any:
        return run["decoder"](generate(context, pooled))

    with torch.no_grad():
        embeddings = run["text"](ids)
        latents = generate(*embeddings)
        images = run["decoder"](latents)
    return {
        "text": lambda: decoded(*run["text"](ids)),
        "modulation": lambda: decoded(*embeddings),
        "transformer": lambda: decoded(*embeddings),
        "decoder": lambda: run["decoder"](latents),
        "encoder": lambda: run["encoder"](images),
    }


def calibrate(
    family: Family,
    parts: Mapping[str, GraphSpec],
    prompts: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str], CalibrationStats]:
    """What meets each weight while the prompts are drawn: by graph and name.

    Args:
        family: of the ``parts``.
        parts: its graphs.
        prompts: of whatever kind will be drawn; time is in proportion to them, memory is not, but to the
            square of each layer's inputs.
        on_progress: told how many prompts are done, of how many.
    """
    import torch

    _, height, width = family.latent
    rows = max(1, PIXELS // (height * width * family.downscale**2))
    with torch.no_grad(), collect_stats({stem: part.module for stem, part in parts.items()}) as told:
        for begin in range(0, len(prompts), rows):
            on_progress(begin, len(prompts))
            reference_outputs(family, parts, prompts[begin : begin + rows], APART + begin)["encoder"]()
        return told()


def sensitivity(
    graph: str,
    module: Any,
    outcome: Callable[[], Any],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    inputs: Mapping[str, CalibrationStats] = MappingProxyType({}),
) -> list[WeightSensitivity]:
    """Every weight of a graph that can be stored in fewer bits, the one that costs most an element first.

    Args:
        graph: its name.
        module: the graph, as a torch module.
        outcome: what comes out with the weights that ``module`` has when it is called.
        on_progress: told how many weights are done, of how many.
        inputs: of some weights, by name. These are rounded by them, and lose as much as their layer's
            outputs; the others as much as themselves.
    """
    import torch

    found, seen = list[WeightSensitivity](), set[int]()
    with torch.no_grad():
        whole = outcome()
        variance = float((whole - whole.mean()).square().sum())
        all_of_them = [*module.named_parameters(), *module.named_buffers()]
        for done, (name, parameter) in enumerate(all_of_them):
            on_progress(done, len(all_of_them))
            if parameter.numel() < SMALLEST or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            array, its = parameter.detach().numpy().copy(), inputs.get(name)
            made = {bits: quantize_dequantize(array, QuantSpec(bits, its)) for bits in WIDTHS}
            lost = {
                bits: its.output_error(back) if its else float(np.square(back - array).sum())
                for bits, (back, _) in made.items()
            }
            with _replaced(parameter, made[MEASURED][0]):
                moved = float((outcome() - whole).square().sum()) / variance
            unit = moved / lost[MEASURED] if lost[MEASURED] else 0.0
            errors = {bits: unit * value for bits, value in lost.items()}
            bytes_ = {bits: size for bits, (_, size) in made.items()}
            found.append(WeightSensitivity(graph, name, array.size, digest(array), bytes_, errors))
    return sorted(found, key=lambda weight: weight.errors[MEASURED] / weight.size, reverse=True)


def allocate_bits(weights: Sequence[WeightSensitivity], bits: int) -> list[int]:
    """Bits of each weight, so that together they take no more than ``bits`` each (:data:`HELD`) and cost as
    little as can be.

    Every weight takes the bits of least ``error + price * bytes``, at the lowest price that keeps within the
    budget; what is left then goes, weight by weight, where a byte saves most.
    """
    room = sum(weight.size for weight in weights) * HELD.get(bits, bits + 16 / GROUP) / 8

    def at(price: float) -> list[int]:
        return [min(WIDTHS, key=lambda b: (w.errors[b] + price * w.bytes[b], w.bytes[b])) for w in weights]

    def fits(chosen: Sequence[int]) -> bool:
        return sum(weight.bytes[b] for weight, b in zip(weights, chosen, strict=True)) <= room

    low, high = 1e-30, 1e30  # beyond all that an error a byte can be
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    chosen = at(high)
    left = room - sum(weight.bytes[b] for weight, b in zip(weights, chosen, strict=True))
    while better := [
        ((weight.errors[now] - weight.errors[b]) / (weight.bytes[b] - weight.bytes[now]), row, b)
        for row, (weight, now) in enumerate(zip(weights, chosen, strict=True))
        for b in WIDTHS
        if weight.errors[b] < weight.errors[now] and 0 < weight.bytes[b] - weight.bytes[now] <= left
    ]:
        _, row, b = max(better)
        left -= weights[row].bytes[b] - weights[row].bytes[chosen[row]]
        chosen[row] = b
    return chosen


def digest(array: np.ndarray) -> str:
    """The same for a matrix and its transpose, and with axes of length 1: an exporter turns some."""
    array = array.squeeze()
    turned = [array, array.T] if array.ndim == 2 else [array]
    return min(hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for each in turned)


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
