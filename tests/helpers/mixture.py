"""The closed-form teacher: rectified flow of a Gaussian mixture (no training, exact samples and scores).

With ``x_t = (1 - t) x_0 + t eps``, ``p_t`` is a mixture of means ``(1 - t) mu_k`` and variances
``s_k^2 = (1 - t)^2 sigma_k^2 + t^2``; ``v = E[eps - x_0 | x_t]``. Serves numpy and torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.core.types import Array, Cond


def _math(x: Array) -> Any:
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


@dataclass(frozen=True)
class Mixture:
    """A Velocity. ``cond.pooled [B, K]`` is added to the log-weights: zeros is no condition.

    means: ``[K, *shape]``; stds: ``[K]``; weights: ``[K]``, summing to 1. Numpy arrays.
    """

    means: np.ndarray
    stds: np.ndarray
    weights: np.ndarray

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        flat, t, means, s2, post = self._posterior(x_t, t, cond)
        away = flat[:, None, :] - (1 - t)[:, :, None] * means
        stds = self._like(self.stds, x_t)[None]
        noise = (t / s2)[:, :, None] * away
        data = means + ((1 - t) * stds * stds / s2)[:, :, None] * away
        return (post[:, :, None] * (noise - data)).sum(1).reshape(x_t.shape)

    def score(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``grad log p_t``, derived from the density and not from the velocity."""
        flat, t, means, s2, post = self._posterior(x_t, t, cond)
        away = flat[:, None, :] - (1 - t)[:, :, None] * means
        return -(post[:, :, None] * away / s2[:, :, None]).sum(1).reshape(x_t.shape)

    def log_density(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``log p_t(x_t)`` up to a constant, ``[B]``."""
        logits = self._logits(x_t, t, cond)[-1]
        top = _math(x_t).amax(logits, 1)
        return top + _math(x_t).log(_math(x_t).exp(logits - top[:, None]).sum(1))

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Exact samples of the data, float32 ``[n, *shape]``."""
        rng = np.random.default_rng(seed)
        modes = rng.choice(len(self.weights), n, p=self.weights)
        shape = self.means.shape[1:]
        stds = self.stds[modes].reshape((-1,) + (1,) * len(shape))
        return (self.means[modes] + stds * rng.standard_normal((n, *shape))).astype(np.float32)

    def cond(self, n: int, mode: int | None = None) -> Cond:
        """The condition of ``n`` numpy samples: none, or one mode alone."""
        pooled = np.zeros((n, len(self.weights)), np.float32)
        if mode is not None:
            pooled -= 1e4
            pooled[:, mode] = 0
        return Cond(np.zeros((n, 1, 1), np.float32), pooled)

    def _like(self, array: np.ndarray, x: Array) -> Array:
        if isinstance(x, np.ndarray):
            return array.astype(x.dtype)
        return x.new_tensor(array)

    def _logits(self, x_t: Array, t: Array, cond: Cond) -> tuple[Array, ...]:
        flat, t = x_t.reshape(len(x_t), -1), t.reshape(-1, 1)
        means = self._like(self.means.reshape(len(self.means), -1), x_t)
        stds = self._like(self.stds, x_t)
        s2 = (1 - t) ** 2 * stds * stds + t * t
        away = flat[:, None, :] - (1 - t)[:, :, None] * means
        logits = self._like(np.log(self.weights), x_t) + cond.pooled
        logits = logits - 0.5 * flat.shape[1] * _math(x_t).log(s2) - 0.5 * (away * away).sum(2) / s2
        return flat, t, means, s2, logits

    def _posterior(self, x_t: Array, t: Array, cond: Cond) -> tuple[Array, ...]:
        *rest, logits = self._logits(x_t, t, cond)
        post = _math(x_t).exp(logits - _math(x_t).amax(logits, 1)[:, None])
        return (*rest, post / post.sum(1)[:, None])


def line() -> Mixture:
    """1-D, two modes of unequal weight and width: samples ``[B, 1]``."""
    return Mixture(np.array([[-1.5], [1.0]]), np.array([0.1, 0.3]), np.array([0.3, 0.7]))


def ring(modes: int = 8) -> Mixture:
    """2-D, equal modes on a circle of radius 2: samples ``[B, 2]``."""
    angles = 2 * np.pi * np.arange(modes) / modes
    means = 2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Mixture(means, np.full(modes, 0.15), np.full(modes, 1 / modes))


def images(modes: int = 4, shape: tuple[int, int, int] = (2, 4, 4)) -> Mixture:
    """Image-shaped, ``[B, C, H, W]``: equal modes at random pictures."""
    means = np.random.default_rng(7).standard_normal((modes, *shape))
    return Mixture(means, np.full(modes, 0.2), np.full(modes, 1 / modes))


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``2 E|a - b| - E|a - a'| - E|b - b'|``, unbiased; 0 for equal distributions (Szekely and Rizzo)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))

    def apart(x: np.ndarray, y: np.ndarray) -> float:
        square = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
        return float(np.sqrt(np.maximum(square, 0)).sum())

    n, m = len(a), len(b)
    np_within = apart(a, a) / (n * (n - 1)) + apart(b, b) / (m * (m - 1))
    return 2 * apart(a, b) / (n * m) - np_within
