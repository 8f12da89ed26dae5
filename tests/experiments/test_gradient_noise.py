"""The noise and the bias of a gradient, where they are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import taught

from fewstep.cli.app import run
from fewstep.experiments.gradient_noise import GradientMoments, gradient_moments


def words(tmp_path: Path, *more: str) -> list[str]:
    made = taught.make(tmp_path)
    common = ["--teacher", str(made.teacher), "--samples", str(made.shards), "--steps", "2", "--every", "2"]
    common += ["--batch-size", "2", "--proxy-updates", "1", "--device", "cpu"]
    common += [] if "--draws" in more else ["--draws", "2"]
    return ["gradient-noise", *common, "-o", str(tmp_path / "out"), *more]


def test_the_command_measures_along_a_training(tmp_path: Path) -> None:
    assert run(words(tmp_path, "--reference-updates", "2", "--reference-draws", "2")) == 0
    note = json.loads((tmp_path / "out/noise.json").read_text())
    assert [each["step"] for each in note["measured"]] == [0, 2]
    assert all(set(each) == {"step", "noise", "cosine", "bias"} for each in note["measured"])
    assert (note["score_point"], note["proxy_target"]) == ("shared", "path")
    assert not (tmp_path / "unused").exists() and not Path("unused").exists()


def test_a_reference_does_not_change_the_training(tmp_path: Path) -> None:
    """The noise after two steps is the same, whether or not a reference was made before."""
    noises: list[list[float]] = []
    for name, more in (("a", ()), ("b", ("--reference-updates", "2", "--reference-draws", "2"))):
        (tmp_path / name).mkdir()
        assert run(words(tmp_path / name, *more)) == 0
        note = json.loads((tmp_path / name / "out/noise.json").read_text())
        noises.append([each["noise"] for each in note["measured"]])
    assert noises[0] == noises[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--draws", "1"), "--draws must be at least 2"),
        (("--lora", "2", "--reference-updates", "1"), "not for --lora"),
        (("--score-point", "renoise", "--gradient-on", "state"), "--gradient-on state is for shared times"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def drawn(signal: float, noise: float, draws: int, first: int = 0, turn: float = 0.0) -> GradientMoments:
    """Moments of a gradient with the known mean ``signal`` (turned in a plane) and deviation ``noise``."""
    net = torch.nn.Linear(100, 10, bias=False)
    mean = torch.full(net.weight.shape, signal)
    mean[:, ::2] *= math.cos(turn) + math.sin(turn)
    mean[:, 1::2] *= math.cos(turn) - math.sin(turn)

    def losses(number: int) -> dict[str, Any]:
        fresh = torch.randn(net.weight.shape, generator=torch.Generator().manual_seed(first + number))
        return {"loss": (net.weight * (mean + noise * fresh)).sum(), "logged": torch.tensor(7.0)}

    return gradient_moments(net, losses, draws)


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_it_is_the_noise_that_was_put_in(signal: float, noise: float) -> None:
    moments = drawn(signal, noise, 16)
    assert moments.noise == pytest.approx(noise**2 / (signal**2 + noise**2), abs=0.03)
    assert moments.variance == pytest.approx(1000 * noise**2, rel=0.05)
    assert moments.signal == pytest.approx(1000 * signal**2, abs=50 * noise**2 + 1e-3)


def test_two_samples_of_one_gradient_have_no_bias_although_their_means_differ() -> None:
    one, other = drawn(1.0, 1.0, 8), drawn(1.0, 1.0, 32, first=100)
    assert not torch.allclose(one.mean, other.mean)
    assert one.relative_bias(other) == pytest.approx(0, abs=0.03)
    assert one.cosine(other) == pytest.approx(1, abs=0.03)


def test_a_turned_and_a_longer_gradient_are_seen() -> None:
    one, turned, longer = drawn(1.0, 0.3, 16), drawn(1.0, 0.3, 16, 50, turn=1.0), drawn(2.0, 0.3, 16, 90)
    assert turned.cosine(one) == pytest.approx(math.cos(1.0), abs=0.02)
    assert turned.relative_bias(one) == pytest.approx(2 - 2 * math.cos(1.0), abs=0.03)
    assert longer.cosine(one) == pytest.approx(1, abs=0.01)
    assert longer.relative_bias(one) == pytest.approx(1, abs=0.03)
