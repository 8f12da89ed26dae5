"""KID against its closed form on normals, a plain double loop, and itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from fewstep.evaluate.metrics.kid import kid


def expected_kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """E (x.y / d + 1)^3 for independent x ~ N(a, I), y ~ N(b, I), from the moments of x.y."""
    d, dot, aa, bb = len(a), a @ b, a @ a, b @ b
    second = d + aa + bb + dot**2
    third = dot**3 + 3 * dot * (aa + bb) + (3 * d + 6) * dot
    return float(1 + 3 * dot / d + 3 * second / d**2 + third / d**3)


def test_set_with_itself_is_zero() -> None:
    x = np.random.default_rng(0).standard_normal((50, 16))
    assert kid(x, x, range(50), range(50)).value == pytest.approx(0, abs=1e-12)


def test_halves_of_one_distribution_cover_zero() -> None:
    rng = np.random.default_rng(1)
    got = [kid(rng.standard_normal((40, 8)), rng.standard_normal((50, 8))) for _ in range(100)]
    assert np.mean([e.low <= 0 <= e.high for e in got]) >= 0.88
    values = np.array([e.value for e in got])
    assert abs(values.mean()) < 3 * values.std() / 10  # unbiased, hence sometimes negative
    assert (values < 0).any()


def test_interval_covers_the_closed_form() -> None:
    rng = np.random.default_rng(2)
    origin, shift = np.zeros(6), np.full(6, 0.6)
    truth = (
        expected_kernel(origin, origin) + expected_kernel(shift, shift) - 2 * expected_kernel(origin, shift)
    )
    got = [kid(rng.standard_normal((60, 6)), rng.standard_normal((60, 6)) + shift) for _ in range(100)]
    assert np.mean([e.value for e in got]) == pytest.approx(truth, rel=0.05)
    assert 0.86 <= np.mean([e.low <= truth <= e.high for e in got]) <= 1.0


def test_shared_prompts_do_not_bias_it() -> None:
    """Two equal models on the same prompts, strongly clustered: ungrouped KID would come out negative."""
    rng = np.random.default_rng(3)
    grouped: list[float] = []
    plain: list[float] = []
    covered = 0
    groups = np.repeat(np.arange(25), 3)
    for _ in range(60):
        centres = 2 * rng.standard_normal((25, 6))
        x, y = (centres[groups] + 0.5 * rng.standard_normal((75, 6)) for _ in range(2))
        estimate = kid(x, y, groups.tolist(), groups.tolist())
        grouped.append(estimate.value)
        plain.append(kid(x, y).value)
        covered += estimate.low <= 0 <= estimate.high
    assert abs(np.mean(grouped)) < 3 * np.std(grouped) / np.sqrt(60)
    assert np.mean(plain) < -3 * np.std(plain) / np.sqrt(60)
    assert covered >= 52


def test_equals_the_double_loop() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((9, 3)) + 0.3
    gx, gy = list("aabbccd"), list("abbcceeef")

    def average(a: NDArray[np.float64], ga: list[str], b: NDArray[np.float64], gb: list[str]) -> float:
        pairs = [(i, j) for i, j in itertools.product(range(len(a)), range(len(b))) if ga[i] != gb[j]]
        return float(np.mean([(a[i] @ b[j] / 3 + 1) ** 3 for i, j in pairs]))

    def plain(keep: str) -> float:
        mx, my = np.array([g in keep for g in gx]), np.array([g in keep for g in gy])
        p, q = [g for g in gx if g in keep], [g for g in gy if g in keep]
        return average(x[mx], p, x[mx], p) + average(y[my], q, y[my], q) - 2 * average(x[mx], p, y[my], q)

    got = kid(x, y, gx, gy)
    assert got.value == pytest.approx(plain("abcdef"))
    without = np.array([plain("abcdef".replace(letter, "")) for letter in "abcdef"])
    error = np.sqrt(5 / 6 * np.sum((without - without.mean()) ** 2))
    assert got.high - got.value == pytest.approx(1.959964 * error)


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((30, 4)) + 0.2
    a, b = kid(x, y), kid(y, rng.permutation(x))
    assert (a.value, a.low) == pytest.approx((b.value, b.low))


def test_refuses_what_it_cannot_measure() -> None:
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match="three groups"):
        kid(x, x, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="one group label"):
        kid(x, x, [0, 1, 2])
