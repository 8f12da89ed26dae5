"""Inverses of the flow's arithmetic, as the papers state them: what the tests compare with."""

from __future__ import annotations

from typing import Any

from fewstep.core.flow import expand, to_noise


def to_velocity(x_t: Any, x0: Any, t: Any) -> Any:
    """``v = (x_t - x_0) / t``, for ``t > 0``."""
    return (x_t - x0) / expand(t, x_t)


def to_score(x_t: Any, v: Any, t: Any) -> Any:
    """``grad log p_t(x_t) = -eps / t``, for ``t > 0``."""
    return -to_noise(x_t, v, t) / expand(t, x_t)


def unshift(t: Any, s: float) -> Any:
    """``u = t / (s - (s - 1) t)``, the inverse of :func:`fewstep.core.flow.shift`."""
    return t / (s - (s - 1) * t)
