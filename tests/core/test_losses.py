from __future__ import annotations

import numpy as np
import pytest

from fewstep.core import flow, losses, sampling, schedule
from mixture import images

SHAPE = (2, 4, 4)


def test_flow_matching_is_zero_at_the_velocity_and_a_mean_elsewhere() -> None:
    x0, noise = sampling.batch_noise([1, 2, 3], SHAPE), sampling.batch_noise([4, 5, 6], SHAPE)
    assert losses.flow_matching(noise - x0, noise, x0) == 0
    assert losses.flow_matching(noise - x0 + 2, noise, x0) == pytest.approx(4)


def test_the_closed_form_velocity_minimises_flow_matching() -> None:
    teacher, n = images(), 4000
    x0, noise = teacher.sample(n, seed=1), sampling.batch_noise(range(n), SHAPE)
    t = schedule.uniform(n, np.random.default_rng(0))
    x_t = flow.interpolate(x0, noise, t)
    v = teacher(x_t, t, teacher.cond(n))
    best = losses.flow_matching(v, noise, x0)
    assert best < losses.flow_matching(1.02 * v, noise, x0)
    assert best < losses.flow_matching(0.98 * v, noise, x0)
    assert best < losses.flow_matching(v + 0.05, noise, x0)


def test_trajectory_is_zero_for_the_chord() -> None:
    teacher, n = images(), 4
    x, cond = sampling.batch_noise(range(n), SHAPE), teacher.cond(n)
    t, t_next = 0.9, 0.75
    arrived = sampling.sample_flow(teacher, x, np.linspace(t, t_next, 17).tolist(), cond)
    chord = (arrived - x) / (t_next - t)
    assert losses.trajectory(chord, x, arrived, t, t_next) == pytest.approx(0, abs=1e-10)
    np.testing.assert_allclose(sampling.euler(x, chord, t, t_next, 0), arrived, atol=1e-6)
    assert losses.trajectory(chord + 1, x, arrived, t, t_next) == pytest.approx(1, rel=1e-5)


def test_trajectory_takes_one_time_a_sample() -> None:
    x, arrived, v = (sampling.batch_noise([i, i + 1, i + 2, i + 3], SHAPE) for i in (0, 10, 20))
    t, t_next = np.array([1, 0.9, 0.75, 0.5], np.float32), np.array([0.9, 0.75, 0.5, 0], np.float32)
    alone = [
        losses.trajectory(v[i : i + 1], x[i : i + 1], arrived[i : i + 1], float(t[i]), float(t_next[i]))
        for i in range(4)
    ]
    assert losses.trajectory(v, x, arrived, t, t_next) == pytest.approx(np.mean(alone), rel=1e-5)


def test_torch_agrees_and_carries_the_gradient() -> None:
    import torch

    x, arrived, v = (sampling.batch_noise([i, i + 1], SHAPE) for i in (0, 10, 20))
    tensors = [torch.from_numpy(a) for a in (x, arrived)]
    v_torch = torch.from_numpy(v).requires_grad_()
    loss = losses.trajectory(v_torch, *tensors, 0.9, 0.75)
    assert loss.item() == pytest.approx(float(losses.trajectory(v, x, arrived, 0.9, 0.75)), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(v_torch.grad, 2 * (v - (arrived - x) / -0.15) / v.size, atol=1e-5)
    pair = losses.flow_matching(torch.from_numpy(v), *tensors)
    assert pair.item() == pytest.approx(float(losses.flow_matching(v, x, arrived)), rel=1e-5)
