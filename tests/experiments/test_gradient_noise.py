"""The share of noise in a gradient, where it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import taught

from fewstep.cli.app import run
from fewstep.experiments.gradient_noise import SCORE_POINTS, gradient_noise_fraction


def test_the_command_measures_every_place_along_a_training(tmp_path: Path) -> None:
    made = taught.make(tmp_path)
    words = ["gradient-noise", "--teacher", str(made.teacher), "--samples", str(made.shards), "--steps", "2"]
    words += ["--every", "2", "--batch-size", "2", "--draws", "2", "--proxy-updates", "1", "--device", "cpu"]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    note = json.loads((tmp_path / "out/noise.json").read_text())
    assert [each["step"] for each in note["measured"]] == [0, 2]
    assert all(set(each) == {"step", *SCORE_POINTS} for each in note["measured"])


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_it_is_the_noise_that_was_put_in(signal: float, noise: float) -> None:
    net = torch.nn.Linear(100, 10, bias=False)

    def losses(number: int) -> dict[str, Any]:
        fresh = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(number))
        pull = signal + noise * fresh  # the loss's gradient
        return {"loss": (net.weight * pull).sum(), "told": torch.tensor(7.0)}

    share = gradient_noise_fraction(net, losses, 16)
    assert share == pytest.approx(noise**2 / (signal**2 + noise**2), abs=0.03)
