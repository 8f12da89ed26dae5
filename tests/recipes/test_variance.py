"""The share of noise in a gradient, where it is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.recipes.variance import noise_share


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_it_is_the_noise_that_was_put_in(signal: float, noise: float) -> None:
    net = torch.nn.Linear(100, 10, bias=False)

    def losses(number: int) -> dict[str, Any]:
        fresh = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(number))
        pull = signal + noise * fresh  # the loss's gradient
        return {"loss": (net.weight * pull).sum(), "told": torch.tensor(7.0)}

    share = noise_share(net, losses, 16)
    assert share == pytest.approx(noise**2 / (signal**2 + noise**2), abs=0.03)
