from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fewstep.core import flow, schedule
from fewstep.core.types import UserError
from inverse_flow import unshift


def test_the_four_step_grid_of_sd35() -> None:
    assert schedule.grid(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_descend_from_one_to_zero(steps: int, shift: float) -> None:
    grid = schedule.grid(steps, shift)
    assert len(grid) == steps + 1
    assert (grid[0], grid[-1]) == (1, 0)
    assert (np.diff(grid) < 0).all()
    np.testing.assert_allclose(np.diff(unshift(np.array(grid), shift)), -1 / steps)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8, 1.0])
def test_strength_is_the_unshifted_start_and_the_steps_stay(strength: float) -> None:
    grid = schedule.strength_grid(4, strength, 3.0)
    assert len(grid) == 5
    assert unshift(grid[0], 3.0) == pytest.approx(strength)
    assert grid[-1] == 0


def test_strength_at_its_ends() -> None:
    assert schedule.strength_grid(4, 1.0, 3.0) == schedule.grid(4, 3.0)
    assert schedule.strength_grid(4, 0.0, 3.0) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"strength": 1.2}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"shift": 0.0}, "shift"),
        ({"shift": math.inf}, "shift"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        schedule.strength_grid(**{"steps": 4, "strength": 1.0, "shift": 3.0, **arguments})


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_grid_is_the_stock_schedulers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    np.testing.assert_allclose(schedule.diffusers_grid(steps, shift), stock.sigmas.numpy(), atol=1e-6)


def test_uniform_moments() -> None:
    t = schedule.uniform(200_000, np.random.default_rng(0))
    assert t.dtype == np.float32
    assert t.mean() == pytest.approx(1 / 2, abs=0.003)
    assert t.var() == pytest.approx(1 / 12, abs=0.001)


def test_logit_normal_moments() -> None:
    t = schedule.logit_normal(200_000, np.random.default_rng(0), mean=-0.5, std=0.8)
    assert t.dtype == np.float32
    logits = np.log(t / (1 - t))
    assert logits.mean() == pytest.approx(-0.5, abs=0.01)
    assert logits.std() == pytest.approx(0.8, abs=0.01)


def test_shifted_density_has_the_shifted_quantiles() -> None:
    t = schedule.shifted(schedule.uniform, 3.0)(200_000, np.random.default_rng(0))
    assert t.dtype == np.float32
    for level in (0.25, 0.5, 0.75):
        assert np.quantile(t, level) == pytest.approx(flow.shift(level, 3.0), abs=0.005)


def test_densities_follow_their_generator() -> None:
    density = schedule.shifted(schedule.logit_normal, 3.0)
    first, again, other = (density(8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).all()


def test_a_shifted_logit_normal_is_one_of_another_mean() -> None:
    """LADD (arXiv 2403.12015) leans to noise by the mean; here the shift does."""
    shifted = schedule.density("logit-normal", math.e)(50_000, np.random.default_rng(0))
    plain = schedule.logit_normal(50_000, np.random.default_rng(0), mean=1.0)
    np.testing.assert_allclose(shifted, plain, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_a_density_refuses_a_shift_that_is_not_positive(shift: float) -> None:
    with pytest.raises(UserError, match="shift"):
        schedule.density("uniform", shift)
