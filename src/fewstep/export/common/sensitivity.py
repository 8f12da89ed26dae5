"""Mixed-precision bit allocation by measured sensitivities.

One weight at a time is quantized while the others stay in float32. The change of the final images is its
sensitivity (of the encoder: the change of its latents). A storage budget then goes where it saves most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core import sampling, schedule
from fewstep.core.types import Cond
from fewstep.export.common.calibration import CalibrationStats, collect_stats
from fewstep.export.common.gptq import GROUP
from fewstep.export.common.graphs import GraphSpec
from fewstep.export.common.onnx_quantize import SMALLEST, QuantSpec, quantize_dequantize
from fewstep.families.base import Family

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTHS = (2, 3, 4, 5, 6, 8, 16)
"""Bits per element that a weight may get."""

BUDGET_BITS = {8: 8.5, 6: 6.4, 4: 4.75}
"""Budget of a precision in stored bits per element, scales included.

It is near that of GGUF's Q8_0, Q6_K and Q4_K (8.5, 6.6 and 4.5 to 4.9). The budget of any other precision is
its bits and a scale per group."""

MEASURED = 4
"""Bits at which the sensitivity is measured.

A small squared error passes through a net in proportion. So the cost of other bits follows from the squared
error of the layer's outputs, or of the weight itself if the layer's inputs are unknown."""

PIXELS = 16 * 128 * 128
"""Pixels per batch of calibration. A decoder needs about 4 kB of memory for each."""

FIRST_SEED = 1000
"""First seed of calibration. No measurement uses the same images."""


@dataclass(frozen=True)
class WeightSensitivity:
    """A weight with its size and sensitivity at each number of bits.

    Attributes:
        graph: name of its graph.
        name: its name in the graph.
        size: number of elements.
        digest: digest of its values (:func:`digest`).
        bytes: stored size in bytes, by bits.
        errors: squared change of the output over the output's variance, by bits.
    """

    graph: str
    name: str
    size: int
    digest: str
    bytes: Mapping[int, int]
    errors: Mapping[int, float]


def reference_outputs(
    family: Family, parts: Mapping[str, GraphSpec], prompts: Sequence[str], seed: int = 0
) -> dict[str, Callable[[], Tensor]]:
    """Return, for every graph, a function that computes its output ``[B, ...]`` with the current weights.

    Prompt ``i`` has the seed ``seed + i``. Sampling takes Euler steps without guidance.
    """
    import torch

    rows, run = len(prompts), {stem: part.module for stem, part in parts.items()}
    ids = family.parts["tokenizer"](
        list(prompts), padding="max_length", truncation=True, return_tensors="pt",
        max_length=parts["text"].inputs["tokens"].shape[1],
    ).input_ids  # fmt: skip
    grid = schedule.grid(family.steps, family.shift)

    def velocity(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        modulation = run["modulation"](t=t, pooled=cond.pooled)
        return run["transformer"](x=x_t, context=cond.context, modulation=modulation)

    def generate(context: Tensor, pooled: Tensor) -> Tensor:
        cond, seeds = Cond(context, pooled), range(seed, seed + rows)
        return sampling.generate_latents(family, cond, seeds, grid, velocity=velocity, sampler="euler")

    def decoded(context: Tensor, pooled: Tensor) -> Tensor:
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
    """Collect the statistics of each weight's inputs while images of the prompts are generated.

    Args:
        family: the family of the ``parts``.
        parts: its graphs.
        prompts: prompts of the kind that the model is for. Time grows with their number. Memory grows with
            the square of each layer's inputs instead.
        on_progress: called with the number of prompts done and in all.

    Returns:
        The statistics by graph and name of the weight.
    """
    import torch

    _, height, width = family.latent
    rows = max(1, PIXELS // (height * width * family.downscale**2))
    with torch.no_grad(), collect_stats({stem: part.module for stem, part in parts.items()}) as collected:
        for begin in range(0, len(prompts), rows):
            on_progress(begin, len(prompts))
            reference_outputs(family, parts, prompts[begin : begin + rows], FIRST_SEED + begin)["encoder"]()
        return collected()


def sensitivity(
    graph: str,
    module: nn.Module,
    outcome: Callable[[], Tensor],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    inputs: Mapping[str, CalibrationStats] = MappingProxyType({}),
) -> list[WeightSensitivity]:
    """Measure the sensitivity of every weight of a graph that can be quantized.

    Args:
        graph: name of the graph.
        module: the graph as a torch module.
        outcome: computes the output with the current weights of ``module``.
        on_progress: called with the number of weights done and in all.
        inputs: calibration statistics by name. A weight that has them is rounded with them, and its error is
            that of the layer's outputs. The error of any other is that of the weight itself.

    Returns:
        The weights, sorted by error per element, the largest first.
    """
    import torch

    results, seen = list[WeightSensitivity](), set[int]()
    with torch.no_grad():
        reference = outcome()
        variance = float((reference - reference.mean()).square().sum())
        tensors = [*module.named_parameters(), *module.named_buffers()]
        for done, (name, parameter) in enumerate(tensors):
            on_progress(done, len(tensors))
            if parameter.numel() < SMALLEST or not parameter.is_floating_point() or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            array, stats = parameter.detach().numpy().copy(), inputs.get(name)
            quantized = {bits: quantize_dequantize(array, QuantSpec(bits, stats)) for bits in WIDTHS}
            squared = {
                bits: stats.output_error(back) if stats else float(np.square(back - array).sum())
                for bits, (back, _) in quantized.items()
            }
            with _replaced(parameter, quantized[MEASURED][0]):
                change = float((outcome() - reference).square().sum()) / variance
            unit = change / squared[MEASURED] if squared[MEASURED] else 0.0
            errors = {bits: unit * value for bits, value in squared.items()}
            bytes_ = {bits: size for bits, (_, size) in quantized.items()}
            results.append(WeightSensitivity(graph, name, array.size, digest(array), bytes_, errors))
    return sorted(results, key=lambda weight: weight.errors[MEASURED] / weight.size, reverse=True)


def allocate_bits(weights: Sequence[WeightSensitivity], bits: int) -> list[int]:
    """Return the bits of each weight that minimize the error within a budget (:data:`BUDGET_BITS`).

    Every weight gets the bits of least ``error + price * bytes``, at the lowest price that keeps within the
    budget. The rest of the budget then goes, weight by weight, where a byte saves most.
    """
    budget = sum(weight.size for weight in weights) * BUDGET_BITS.get(bits, bits + 16 / GROUP) / 8

    def at(price: float) -> list[int]:
        return [min(WIDTHS, key=lambda b: (w.errors[b] + price * w.bytes[b], w.bytes[b])) for w in weights]

    def fits(chosen: Sequence[int]) -> bool:
        return sum(weight.bytes[b] for weight, b in zip(weights, chosen, strict=True)) <= budget

    low, high = 1e-30, 1e30  # outside the range of an error per byte
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    chosen = at(high)
    left = budget - sum(weight.bytes[b] for weight, b in zip(weights, chosen, strict=True))
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
    """Return a digest that ignores transposition and axes of length 1, which exporters change."""
    array = array.squeeze()
    orders = [array, array.T] if array.ndim == 2 else [array]
    return min(hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for each in orders)


@contextmanager
def _replaced(parameter: Tensor, array: np.ndarray) -> Generator[None]:
    import torch

    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(array))
        try:
            yield
        finally:
            parameter.copy_(original)
