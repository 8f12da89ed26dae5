"""What a weight's loss of bits costs, where it is known; and where a budget goes."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from fewstep.export.common import graphs
from fewstep.export.common import sensitivity as measured
from fewstep.export.common.gptq import GROUP
from fewstep.export.common.onnx_quantize import QuantSpec, quantize_dequantize
from fewstep.export.common.sensitivity import (
    BUDGET_BITS,
    MEASURED,
    WIDTHS,
    WeightSensitivity,
    allocate_bits,
    digest,
    reference_outputs,
    sensitivity,
)
from fewstep.families import sd3
from fewstep.families.base import Family

pytestmark = pytest.mark.slow(15)


class Two(nn.Module):
    """``y = a(x) + b(x)``, of which ``b`` is a thousand times smaller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        with torch.no_grad():
            self.b.weight.mul_(1e-3)

    def forward(self, x: Any) -> Any:
        return self.a(x) + self.b(x)


@pytest.fixture(scope="module")
def two() -> tuple[Two, torch.Tensor, list[WeightSensitivity]]:
    net, x = Two(), torch.randn(64, 64)
    return net, x, sensitivity("two", net, lambda: net(x))


def test_what_the_output_hardly_hears_costs_little(
    two: tuple[Two, torch.Tensor, list[WeightSensitivity]],
) -> None:
    net, _, found = two
    assert [weight.name for weight in found] == ["a.weight", "b.weight"]
    assert found[0].errors[4] > 1e5 * found[1].errors[4] > 0
    fresh = Two()
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), fresh.parameters(), strict=True)
    )  # put back


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_cost_is_the_change_of_what_comes_out(
    two: tuple[Two, torch.Tensor, list[WeightSensitivity]], bits: int
) -> None:
    """Measured at one width, foretold at the others: of noise-like errors within a few percent."""
    net, x, (weight, _) = two
    back, size = quantize_dequantize(net.a.weight.detach().numpy(), QuantSpec(bits))
    with torch.no_grad():
        y = net(x)
        known = (x @ (torch.from_numpy(back) - net.a.weight).T).square().sum() / (y - y.mean()).square().sum()
    assert weight.errors[bits] == pytest.approx(float(known), rel=1e-3 if bits == MEASURED else 0.1)
    assert weight.bytes[bits] == size


def fake(name: str, size: int, cost: float) -> WeightSensitivity:
    bytes_ = {bits: size * bits // 8 for bits in WIDTHS}
    return WeightSensitivity(
        "net", name, size, name, bytes_, {bits: cost * size * 4.0**-bits for bits in WIDTHS}
    )


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_a_budget_is_kept_and_spent_well(bits: int) -> None:
    weights = [fake("a", 640, 1e-3), fake("b", 6400, 1e-6), fake("c", 1280, 1.0), fake("d", 3200, 1e-4)]
    room = sum(weight.size for weight in weights) * BUDGET_BITS.get(bits, bits + 16 / GROUP) / 8

    def taken(chosen: Any) -> int:
        return sum(weight.bytes[b] for weight, b in zip(weights, chosen, strict=True))

    def error(chosen: Any) -> float:
        return sum(weight.errors[b] for weight, b in zip(weights, chosen, strict=True))

    chosen = allocate_bits(weights, bits)
    assert taken(chosen) <= room
    assert chosen[2] >= chosen[0] >= chosen[3] >= chosen[1]  # the costlier an element, the more bits
    no_larger = [other for other in product(WIDTHS, repeat=4) if taken(other) <= taken(chosen)]
    assert error(chosen) == min(map(error, no_larger))


def test_a_weight_is_known_again_when_it_is_turned() -> None:
    array = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    assert digest(array) == digest(array.T) == digest(np.ascontiguousarray(array.T))
    assert digest(array) != digest(-array)


def test_every_weight_of_the_graphs_is_measured_once_and_known_again(
    small: Family, traced: dict[str, Any]
) -> None:
    from onnx import TensorProto, numpy_helper

    parts = graphs.parts(small)
    measured_: list[str] = []
    for part in parts.values():
        weights = [*part.module.parameters(), *part.module.buffers()]
        measured_ += [digest(each.detach().numpy()) for each in weights if each.is_floating_point()]
    large = [
        numpy_helper.to_array(weight)
        for name in parts
        for weight in traced[name].graph.initializer
        if weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) >= 256
    ]
    assert {digest(array) for array in large} <= set(measured_)
    counts = [measured_.count(digest(array)) for array in large]
    assert max(counts) == 1, counts


def test_what_comes_out_is_a_walk_s_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.core import sampling, schedule

    monkeypatch.setattr(measured, "SMALLEST", 256)
    family = sd3.assemble(tiny.parts(with_t5=False), name="small", steps=3, guidance=None)
    parts, prompts = graphs.parts(family), ["a cat", "a dog"]
    outcome = reference_outputs(family, parts, prompts)
    assert set(outcome) == set(parts)
    grid = list(schedule.grid(3, family.shift))
    with torch.no_grad():
        noise = family.from_numpy(sampling.batch_noise(range(2), family.latent))
        plain = sampling.sample_flow(family.velocity, noise, grid, family.text(prompts))
        assert len(list(pairwise(grid))) == 3
        images = family.codec.decode(plain)
        for graph in ("text", "modulation", "transformer", "decoder"):
            torch.testing.assert_close(outcome[graph](), images)
    for graph in ("text", "modulation", "transformer", "decoder"):
        found = sensitivity(graph, parts[graph].module, outcome[graph])
        assert found and max(weight.errors[4] for weight in found) > 0
