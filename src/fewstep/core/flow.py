"""The arithmetic of rectified flow: one text for numpy arrays and torch tensors.

``t = 0`` is data, ``t = 1`` is noise, ``x_t = (1 - t) x_0 + t eps`` and ``v = eps - x_0``
(Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206, section 2). A time is a Python
float, or one value a sample, shape ``[B]``; anything else is an error, never a silent broadcast.
"""

from __future__ import annotations

import numpy as np

from fewstep.core.types import Array


def expand(t: Array, x: Array) -> Array:
    """Give the time ``t`` the rank of ``x [B, ...]``.

    Args:
        t: a Python number, or an array of shape ``[B]``.
        x: the samples that it belongs to, ``[B, ...]``.

    Returns:
        a float, or ``[B, 1, ..., 1]``.

    Raises:
        ValueError: ``t`` is neither a number nor of shape ``[B]``.
    """
    if isinstance(t, int | float):
        return float(t)
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"time of shape {tuple(t.shape)} for {x.shape[0]} samples: give one time a sample")
    return t.reshape((-1,) + (1,) * (x.ndim - 1))


def expand_time(t: float, x: Array) -> Array:
    """The time ``t`` once for every sample of ``x [B, ...]``: float32 ``[B]``, whatever the type of ``x``."""
    rows = x.shape[0]
    if isinstance(x, np.ndarray):
        return np.full(rows, t, np.float32)
    # Filled after the cast: a bf16 time would turn .74925 into .748.
    return x.new_zeros(rows).float() + t


def interpolate(x0: Array, noise: Array, t: Array) -> Array:
    """``x_t = (1 - t) x_0 + t eps``; all ``[B, ...]``."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def to_x0(x_t: Array, v: Array, t: Array) -> Array:
    """``x_0 = x_t - t v``."""
    return x_t - expand(t, x_t) * v


def to_noise(x_t: Array, v: Array, t: Array) -> Array:
    """``eps = x_t + (1 - t) v``."""
    return x_t + (1 - expand(t, x_t)) * v


def to_velocity(x_t: Array, x0: Array, t: Array) -> Array:
    """``v = (x_t - x_0) / t``, for ``t > 0``."""
    return (x_t - x0) / expand(t, x_t)


def to_score(x_t: Array, v: Array, t: Array) -> Array:
    """``grad log p_t(x_t) = -eps / t``, for ``t > 0``."""
    return -to_noise(x_t, v, t) / expand(t, x_t)


def shift(u: Array, s: float) -> Array:
    """Time shift ``t = s u / (1 + (s - 1) u)`` (arXiv 2403.03206, equation 23); ``[0, 1]`` onto itself."""
    return s * u / (1 + (s - 1) * u)


def unshift(t: Array, s: float) -> Array:
    """The inverse of :func:`shift`: ``u = t / (s - (s - 1) t)``."""
    return t / (s - (s - 1) * t)
