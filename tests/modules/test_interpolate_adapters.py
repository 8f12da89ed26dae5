"""SenseFlow's alignment of LoRA adapters: the product moves, and stays of its rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.modules.lora import LoRALayer, LoRAParameters, interpolate_adapters

RANK = 3


def adapter(seed: int) -> LoRAParameters:
    generator = torch.Generator().manual_seed(seed)
    layers = {name: LoRALayer(nn.Linear(7, out), RANK, generator) for name, out in (("q", 5), ("v", 9))}
    for layer in layers.values():
        nn.init.normal_(layer.b, generator=generator)
    return LoRAParameters(layers)


def products(own: LoRAParameters) -> list[torch.Tensor]:
    return [(layer.b @ layer.a).detach().clone() for layer in own.layers]


@pytest.mark.parametrize("weight", [0.0, 0.02, 0.5, 1.0])
def test_the_product_is_the_nearest_of_its_rank_to_the_mean(weight: float) -> None:
    own, other = adapter(0), adapter(1)
    means = [torch.lerp(p, q, weight) for p, q in zip(products(own), products(other), strict=True)]
    interpolate_adapters(own, other, weight)
    for product, mean in zip(products(own), means, strict=True):
        u, s, vh = torch.linalg.svd(mean)
        nearest = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        assert torch.allclose(product, nearest, atol=1e-5)


def test_an_adapter_of_zeros_can_still_learn() -> None:
    """A new adapter's product is 0; the gradient of ``B`` goes through ``A``, which must not become 0."""
    own, other = adapter(0), adapter(1)
    for each in (own, other):
        for layer in each.layers:
            nn.init.zeros_(layer.b)
    size = [float(layer.a.detach().norm()) for layer in own.layers]
    interpolate_adapters(own, other, 0.02)
    for layer, before in zip(own.layers, size, strict=True):
        assert float((layer.b @ layer.a).detach().abs().max()) < 1e-6
        assert float(layer.a.detach().norm()) == pytest.approx(before, rel=1e-4)
        assert int(torch.linalg.matrix_rank(layer.a.detach())) == RANK
