"""The arithmetic of rectified flow, for numpy arrays and torch tensors alike.

``t = 0`` is data, ``t = 1`` is noise, ``x_t = (1 - t) x_0 + t eps`` and ``v = eps - x_0``
(Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206, section 2). A time is a Python
float, or one value per sample, shape ``[B]``. Any other shape is an error and never broadcasts.
"""

from __future__ import annotations

import numpy as np

from fewstep.core.types import Array


def expand(t: Array, x: Array) -> Array:
    """Give the time ``t`` the rank of ``x [B, ...]``.

    Args:
        t: a Python number, or an array of shape ``[B]``.
        x: the samples of that time, ``[B, ...]``.

    Returns:
        a float, or ``[B, 1, ..., 1]``.

    Raises:
        ValueError: ``t`` is neither a number nor of shape ``[B]``.
    """
    if isinstance(t, int | float):
        return float(t)
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"time of shape {tuple(t.shape)} for {x.shape[0]} samples: give one time per sample")
    return t.reshape((-1,) + (1,) * (x.ndim - 1))


def expand_time(t: float, x: Array) -> Array:
    """Return ``t`` once for every sample of ``x [B, ...]``: float32 ``[B]`` for any type of ``x``."""
    rows = x.shape[0]
    if isinstance(x, np.ndarray):
        return np.full(rows, t, np.float32)
    # Filled after the cast: in bf16 the time .74925 would become .748.
    return x.new_zeros(rows).float() + t


def interpolate(x0: Array, noise: Array, t: Array) -> Array:
    """Return ``x_t = (1 - t) x_0 + t eps``; all ``[B, ...]``."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * noise


def to_x0(x_t: Array, v: Array, t: Array) -> Array:
    """Return ``x_0 = x_t - t v``."""
    return x_t - expand(t, x_t) * v


def to_noise(x_t: Array, v: Array, t: Array) -> Array:
    """Return ``eps = x_t + (1 - t) v``."""
    return x_t + (1 - expand(t, x_t)) * v


def shift(u: Array, s: float) -> Array:
    """Shift times: ``t = s u / (1 + (s - 1) u)`` (arXiv 2403.03206, equation 23), from [0, 1] onto [0, 1]."""
    return s * u / (1 + (s - 1) * u)
