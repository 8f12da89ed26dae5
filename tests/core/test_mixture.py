"""The closed-form teacher against sources other than its own formula."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.core import flow
from inverse_flow import to_score
from mixture import Mixture, energy_distance, images, line, ring

TEACHERS = pytest.mark.parametrize("teacher", [line(), ring(), images()], ids=["line", "ring", "images"])


def points(teacher: Mixture, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    t = np.linspace(0.2, 1.0, n)
    x0 = teacher.sample(n, seed=5).astype(np.float64)
    return flow.interpolate(x0, rng.standard_normal(x0.shape), t), t


@TEACHERS
def test_velocity_gives_the_score(teacher: Mixture) -> None:
    x, t = points(teacher)
    cond = teacher.cond(len(x))
    np.testing.assert_allclose(to_score(x, teacher(x, t, cond), t), teacher.score(x, t, cond), atol=1e-9)


@TEACHERS
def test_score_is_the_slope_of_the_density(teacher: Mixture) -> None:
    x, t = points(teacher)
    cond, h = teacher.cond(len(x)), 1e-5
    score = teacher.score(x, t, cond).reshape(len(x), -1)
    for d in range(score.shape[1]):
        bump = np.zeros_like(score)
        bump[:, d] = h
        bump = bump.reshape(x.shape)
        slope = teacher.log_density(x + bump, t, cond) - teacher.log_density(x - bump, t, cond)
        np.testing.assert_allclose(slope / (2 * h), score[:, d], atol=1e-5)


@pytest.mark.parametrize("teacher", [line(), ring()], ids=["line", "ring"])
def test_velocity_is_the_conditional_mean(teacher: Mixture) -> None:
    """``E[eps - x_0 | x_t]`` by weighing exact samples of x_0 by their likelihood."""
    x, t = points(teacher)
    x0 = teacher.sample(400_000, seed=6).astype(np.float64)
    v = teacher(x, t, teacher.cond(len(x)))
    for i in range(len(x)):
        noise = (x[i] - (1 - t[i]) * x0) / t[i]
        weight = np.exp(-0.5 * np.square(noise).sum(1))
        mean = (weight[:, None] * (noise - x0)).sum(0) / weight.sum()
        np.testing.assert_allclose(v[i], mean, atol=0.03)


@TEACHERS
def test_torch_agrees_and_its_gradient_is_the_score(teacher: Mixture) -> None:
    import torch

    x, t = points(teacher)
    cond = teacher.cond(len(x))
    xt, tt, ct = torch.tensor(x, requires_grad=True), torch.tensor(t), cond.map(torch.from_numpy)
    np.testing.assert_allclose(teacher(xt, tt, ct).detach(), teacher(x, t, cond), atol=1e-9)
    (slope,) = torch.autograd.grad(teacher.log_density(xt, tt, ct).sum(), xt)
    np.testing.assert_allclose(slope, teacher.score(x, t, cond), atol=1e-9)


def test_a_condition_picks_its_mode() -> None:
    teacher = ring()
    x, t = points(teacher)
    alone = Mixture(teacher.means[2:3], teacher.stds[2:3], np.ones(1))
    np.testing.assert_allclose(
        teacher(x, t, teacher.cond(len(x), mode=2)), alone(x, t, alone.cond(len(x))), atol=1e-9
    )


def test_energy_distance_tells_apart() -> None:
    teacher = ring()
    a, b = teacher.sample(1000, seed=1), teacher.sample(1000, seed=2)
    assert abs(energy_distance(a, b)) < 0.01
    # Two points masses at distance 3: 2 * 3 - 0 - 0.
    assert energy_distance(np.zeros((5, 1)), np.full((4, 1), 3.0)) == pytest.approx(6)
