"""Losses (floor 1): pure functions from arrays to a scalar; nothing here steps, logs or owns a net."""

from __future__ import annotations

from fewstep.flow import expand
from fewstep.types import Array


def _mean_square(error: Array) -> Array:
    """Mean over each sample of ``[B, ...]``, then over the samples."""
    return (error * error).reshape(error.shape[0], -1).mean(1).mean()


def flow_matching(v_pred: Array, noise: Array, x0: Array) -> Array:
    """``|| v - (eps - x_0) ||^2`` (Lipman et al., arXiv 2210.02747, for the straight path).

    Args:
        v_pred: the net's velocity at ``mix(x0, noise, t)``, ``[B, C, H, W]``.
        noise: ``eps``, ``[B, C, H, W]``.
        x0: the data, ``[B, C, H, W]``.
    """
    return _mean_square(v_pred - (noise - x0))


def trajectory(v_pred: Array, x_t: Array, x_next: Array, t: Array, t_next: Array) -> Array:
    """``|| v - (x_next - x_t) / (t_next - t) ||^2``: one step does what the teacher did in many.

    Trajectory guidance of SD3.5-Flash (arXiv 2509.21318).

    Args:
        v_pred: the student's velocity at ``(x_t, t)``, ``[B, C, H, W]``.
        x_t: where the teacher's walk started, ``[B, C, H, W]``.
        x_next: where it arrived at ``t_next``, ``[B, C, H, W]``.
        t: start times, a float or ``[B]``.
        t_next: arrival times, a float or ``[B]``; different from ``t``.
    """
    return _mean_square(v_pred - (x_next - x_t) / (expand(t_next, x_t) - expand(t, x_t)))
