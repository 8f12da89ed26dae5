"""The two published values, and what any distance must hold."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate.frechet import frechet, moments


def test_scaled_and_shifted_normal() -> None:
    a, b = (np.zeros(64), np.eye(64)), (np.full(64, 0.3), 4 * np.eye(64))
    assert frechet(a, b) == pytest.approx(69.76)


def test_covariances_that_do_not_commute() -> None:
    a = (np.zeros(2), np.array([[2.0, 1], [1, 2]]))
    b = (np.array([1.0, 2]), np.diag([3.0, 1]))
    assert frechet(a, b) == pytest.approx(5.516685226, abs=1e-9)
    assert frechet(b, a) == pytest.approx(frechet(a, b))


def test_of_samples() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3))
    assert frechet(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    assert frechet(moments(x), moments(x + np.array([1, 0, 2]))) == pytest.approx(5)
    assert frechet(moments(x), moments(2 * rng.standard_normal((4000, 3)))) == pytest.approx(3, abs=0.2)


def test_singular_covariance_is_no_trouble() -> None:
    x = np.random.default_rng(1).standard_normal((5, 20))
    assert frechet(moments(x), moments(x)) == pytest.approx(0, abs=1e-6)
