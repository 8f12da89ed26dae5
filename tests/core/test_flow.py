from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fewstep.core import flow
from inverse_flow import to_velocity, unshift

SHAPE = (4, 2, 3, 4)  # as many samples as columns: where a hidden broadcast would go unseen


def arrays(kind: str) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    t = np.array([0.1, 0.4, 0.7, 1.0], np.float32)
    if kind == "numpy":
        return x0, noise, t
    import torch

    return torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(t)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_conversions_are_inverse(kind: str) -> None:
    x0, noise, t = arrays(kind)
    v = noise - x0
    x_t = flow.interpolate(x0, noise, t)
    close(flow.to_x0(x_t, v, t), x0)
    close(flow.to_noise(x_t, v, t), noise)
    close(to_velocity(x_t, x0, t), v)
    close(flow.interpolate(flow.to_x0(x_t, v, t), flow.to_noise(x_t, v, t), t), x_t)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_time_belongs_to_its_sample(kind: str) -> None:
    x0, noise, t = arrays(kind)
    together = flow.interpolate(x0, noise, t)
    for i, alone in enumerate(t):
        close(together[i], flow.interpolate(x0[i : i + 1], noise[i : i + 1], float(alone))[0])


def test_numpy_and_torch_agree_and_stay_float32() -> None:
    ours, theirs = arrays("numpy"), arrays("torch")
    for function in (flow.interpolate, flow.to_x0, flow.to_noise):
        a, b = function(*ours), function(*theirs)
        assert a.dtype == np.float32
        assert str(b.dtype) == "torch.float32"
        close(a, b)
    assert flow.interpolate(ours[0], ours[1], np.float64(0.3)).dtype == np.float32


@pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (4, 1, 1, 1), ()])
def test_a_time_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    x0, noise, _ = arrays("numpy")
    with pytest.raises(ValueError, match="one time per sample"):
        flow.interpolate(x0, noise, np.full(shape, 0.5, np.float32))


def test_signal_to_noise_falls_with_time() -> None:
    t = np.linspace(0.01, 0.99, 99)
    one = np.ones((99, 1))
    signal, noise = flow.interpolate(one, 0 * one, t), flow.interpolate(0 * one, one, t)
    assert (np.diff((signal / noise) ** 2, axis=0) < 0).all()


def test_shift_and_its_inverse() -> None:
    u = np.linspace(0, 1, 101)
    t = flow.shift(u, 3.0)
    assert (t[0], t[-1]) == (0, 1)
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(unshift(t, 3.0), u, atol=1e-15)
    # Shifting by s divides the signal-to-noise ratio's root by s (arXiv 2403.03206, equation 23).
    np.testing.assert_allclose((1 - t[1:]) / t[1:], (1 - u[1:]) / u[1:] / 3, atol=1e-12)


def test_fill_keeps_float32_for_a_half_precision_net() -> None:
    import torch

    t = flow.expand_time(0.74925, torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16))
    assert t.dtype == torch.float32
    assert t.tolist() == flow.expand_time(0.74925, np.zeros((2, 1), np.float16)).tolist()
