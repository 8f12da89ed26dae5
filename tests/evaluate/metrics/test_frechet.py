"""The Fréchet distance: two published values, and samples of known normals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fewstep.core.stats import Interval
from fewstep.evaluate.metric import ImageBatch, Prompt, Reference, References
from fewstep.evaluate.metrics.frechet import Frechet, frechet

BLANK = np.zeros((3, 1, 1), np.uint8)


def test_scaled_and_shifted_normal() -> None:
    a, b = (np.zeros(64), np.eye(64)), (np.full(64, 0.3), 4 * np.eye(64))
    assert frechet(a, b) == pytest.approx(69.76)


def test_covariances_that_do_not_commute() -> None:
    a = (np.zeros(2), np.array([[2.0, 1], [1, 2]]))
    b = (np.array([1.0, 2]), np.diag([3.0, 1]))
    assert frechet(a, b) == pytest.approx(5.516685226, abs=1e-9)
    assert frechet(b, a) == pytest.approx(frechet(a, b))


def of_samples(x: NDArray[np.float64], y: NDArray[np.float64]) -> Interval:
    """The metric on images with features ``x``, one per prompt, against references with features ``y``."""
    metric = Frechet(References([Reference(BLANK)] * len(y), y.astype(np.float32)))
    for rows in np.array_split(x.astype(np.float32), 3):
        metric.update(ImageBatch(np.stack([BLANK] * len(rows)), rows), [Prompt("a") for _ in rows])
    return metric.compute()["frechet"]


def test_of_samples() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3))
    assert of_samples(x, x).value == pytest.approx(0, abs=1e-9)
    assert of_samples(x, x + np.array([1, 0, 2])).value == pytest.approx(5, rel=1e-5)
    assert of_samples(x, 2 * rng.standard_normal((4000, 3))).value == pytest.approx(3, abs=0.2)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    intervals = [
        of_samples(rng.standard_normal((400, 2)) + np.array([1, 0]), rng.standard_normal((20_000, 2)))
        for _ in range(100)
    ]
    assert 0.86 <= np.mean([each.low <= 1 <= each.high for each in intervals]) <= 1


def test_singular_covariance_is_no_trouble() -> None:
    x = np.random.default_rng(1).standard_normal((5, 20))
    assert of_samples(x, x).value == pytest.approx(0, abs=1e-6)


def test_two_prompts_have_no_interval() -> None:
    metric = Frechet(References([], np.zeros((5, 2), np.float32)))
    metric.update(ImageBatch(np.stack([BLANK] * 2), np.eye(2, dtype=np.float32)), [Prompt("a"), Prompt("b")])
    assert metric.compute() == {}
