"""Intervals must cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.core import stats


def test_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        got = stats.mean(rng.binomial(4, 0.3, size=80) / 4)
        assert got.low <= got.value <= got.high
        covered += got.low <= 0.3 <= got.high
    assert 0.88 <= covered / 150 <= 0.99


def test_interval_narrows_with_the_root_of_the_count() -> None:
    rng = np.random.default_rng(1)
    few, many = (stats.mean(rng.standard_normal(n)) for n in (100, 1600))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.2)


def test_ratio_is_paired() -> None:
    rng = np.random.default_rng(2)
    below = rng.uniform(0.1, 1, 100)
    exact = stats.ratio(0.9 * below, below)
    assert exact is not None
    assert (exact.low, exact.value, exact.high) == pytest.approx((0.9, 0.9, 0.9))
    loose = stats.ratio(0.9 * rng.permutation(below), below)
    assert loose is not None
    assert loose.high - loose.low > 0.05


def test_ratio_to_nothing_has_no_value() -> None:
    assert stats.ratio(np.ones(5), np.zeros(5)) is None
    rare = stats.ratio(np.ones(5), np.array([1.0, 0, 0, 0, 0]))
    assert rare is not None
    assert rare.value == 5
    assert np.isinf(rare.high)


def test_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        stats.mean(np.array([]))
    with pytest.raises(ValueError, match="same prompts"):
        stats.ratio(np.ones(3), np.ones(4))
