"""What leaves its bounds for long is said; what does not is let be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.worker import run_of

from fewstep.core.types import UserError
from fewstep.methods.base import Losses, StepRandom, Update
from fewstep.train.divergence import BOUNDS, FIRST, PATIENCE, DivergenceMonitor
from fewstep.train.trainer import train


def stopped_at(figure: str, values: Sequence[float]) -> int | None:
    watch = DivergenceMonitor()
    for step, value in enumerate(values):
        try:
            watch.check(step, {figure: value, "square": 1.0})
        except UserError:
            return step
    return None


START = [1.0, 1.1, 0.9, 1.0, 1.0]


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("latent/mean", 1.6),
        ("latent/mean", 0.4),
        ("latent/std", 0.4),
        ("latent/std", 2.1),
        ("proxy", 3.1),
        ("proxy/flow", 3.1),
        ("proxy", float("nan")),
    ],
)
def test_a_figure_out_of_bounds_for_long_enough_stops_the_run(figure: str, value: float) -> None:
    assert stopped_at(figure, [*START, *[value] * 20]) == FIRST + PATIENCE - 1


@pytest.mark.parametrize(
    ("figure", "values"),
    [
        ("latent/mean", [1.4] * 30),
        ("latent/std", [0.6] * 30),
        ("proxy", [0.0] * 30),
        ("proxy", [2.9] * 30),
        ("proxy", ([9.0] * (PATIENCE - 1) + [1.0]) * 9),  # comes back each time
        ("norm/proxy", [99.0] * 30),
        ("proxyish", [99.0] * 30),
        ("square", [99.0] * 30),
    ],
)
def test_what_is_within_or_comes_back_or_is_not_watched_is_let_be(figure: str, values: list[float]) -> None:
    assert stopped_at(figure, START + values) is None


def test_a_resumed_run_remembers_how_it_began() -> None:
    watch = DivergenceMonitor()
    watch.load_history([{"proxy": value} for value in [*START, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]])
    for step in range(PATIENCE - 1):
        watch.check(step, {"proxy": 9.0})
    with pytest.raises(UserError, match="began as 1 "):
        watch.check(PATIENCE, {"proxy": 9.0})


def test_every_bound_says_what_to_do() -> None:
    assert all(bound.means and "--lr" in bound.means for bound in BOUNDS)


class Drifting:
    """Its latents drift from step 8 on."""

    def __init__(self) -> None:
        self.nets: dict[str, Any] = {"net": torch.nn.Linear(4, 4)}
        self.step = 0

    def updates(self, step: int) -> Sequence[Update]:
        self.step = step
        return [Update("net", self.losses)]

    def losses(self, batch: Any, draw: StepRandom) -> Losses:
        mean = torch.tensor(0.2 * max(0, self.step - 7))
        return {"square": (self.nets["net"](batch) - batch).square().mean(), "latent/mean": mean}


@pytest.mark.parametrize("watch", [True, False])
def test_a_run_stops_in_words_and_a_checkpoint_resumes(tmp_path: Path, watch: bool) -> None:
    make: Callable[[], Any] = lambda: replace(  # noqa: E731
        run_of(tmp_path, 30, log_every=1, detect_divergence=watch, save_minutes=60.0), method=Drifting()
    )
    if not watch:
        return train(make())
    with pytest.raises(UserError, match=r"step 15: latent/mean is .* drift"):
        train(make())
