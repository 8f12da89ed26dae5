"""What a weight's loss of bits costs, where it is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from fewstep.deploy.common import graphs
from fewstep.deploy.common import sensitivity as measured
from fewstep.deploy.common.sensitivity import Weight, digest, real_inputs, sensitivity, spared
from fewstep.deploy.common.weights import approximate
from fewstep.families import sd3


class Two(nn.Module):
    """``y = a(x) + b(x)``, of which ``b`` is a thousand times smaller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        with torch.no_grad():
            self.b.weight.mul_(1e-3)

    def forward(self, x: Any) -> Any:
        return self.a(x) + self.b(x)


def test_what_the_output_hardly_hears_costs_little() -> None:
    net, x = Two(), torch.randn(8, 64)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    found = sensitivity(graphs.Part(net, {"x": x}, ("y",)), [{"x": x}, {"x": 2 * x}], 4)
    assert [weight.name for weight in found] == ["a.weight", "b.weight"]
    assert found[0].error > 1e5 * found[1].error > 0
    lost = torch.from_numpy(approximate(net.a.weight.detach().numpy(), 4)) - net.a.weight
    with torch.no_grad():
        known = (x @ lost.T).square().sum() / net(x).square().sum()
    assert found[0].error == pytest.approx(float(known), rel=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))  # all is put back


def test_the_costliest_are_spared_as_far_as_there_is_room() -> None:
    weights = [Weight("a", 60, 1.0, "a"), Weight("b", 10, 0.1, "b"), Weight("c", 30, 0.01, "c")]
    assert set(spared(weights, 0.2)) == {"b"}
    assert set(spared(weights, 0.7)) == {"a", "b"}
    assert spared(weights, 0.0) == {}


def test_a_weight_is_known_again_when_it_is_turned() -> None:
    array = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    assert digest(array) == digest(array.T) == digest(np.ascontiguousarray(array.T))
    assert digest(array) != digest(-array)


def test_what_reaches_each_graph_is_what_the_walk_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SMALLEST", 256)
    family = sd3.assemble(tiny.parts(with_t5=False), name="small", steps=3, guidance=None)
    parts = graphs.parts(family)
    told = real_inputs(family, parts, ["a cat", "a dog"])
    assert set(told) == set(parts)
    assert [len(told[stem]) for stem in ("text", "modulation", "transformer", "decoder")] == [1, 3, 3, 1]
    with torch.no_grad():
        cond = family.text(["a cat", "a dog"])
    assert torch.equal(told["transformer"][0]["context"], cond.context)
    assert float(told["modulation"][0]["t"][0]) == 1.0
    found = sensitivity(parts["transformer"], told["transformer"], 4)
    assert found and all(weight.error >= 0 for weight in found)
