"""Times: the grids of sampling, and the densities that training samples from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from fewstep.core.flow import shift as shift_time
from fewstep.core.types import UserError

Density = Callable[[int, np.random.Generator], np.ndarray]
"""``density(n, rng)`` draws ``n`` times in [0, 1], float32 ``[n]``."""

DensityName = Literal["uniform", "logit-normal"]
"""The densities that :func:`density` knows, before the shift."""


def grid(steps: int, shift: float = 3.0) -> list[float]:
    """Return the ``steps + 1`` sampling times, descending from 1 to 0.

    Evenly spaced, then shifted: 4 steps at shift 3 are 1, .9, .75, .5, 0.

    Raises:
        UserError: fewer than one step, or a shift that is not a positive number.
    """
    return strength_grid(steps, 1.0, shift)


def strength_grid(steps: int, strength: float, shift: float = 3.0) -> list[float]:
    """Return the grid of image-to-image: ``steps`` steps from the unshifted position ``strength`` to 0.

    Args:
        steps: number of steps, at least 1.
        strength: 1 is the full grid. 0 keeps the image: the grid is a single time, without a step.
        shift: time shift ``s``.

    Raises:
        UserError: a value out of its range.
    """
    if steps < 1:
        raise UserError(f"steps must be a whole number of at least 1, not {steps}")
    if not 0 <= strength <= 1:
        raise UserError(f"strength must lie between 0 and 1, not {strength}")
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"shift must be a positive number, not {shift}")
    if strength == 0:
        return [0.0]
    return [shift_time(strength * (steps - i) / steps, shift) for i in range(steps + 1)]


def diffusers_grid(steps: int, shift: float = 3.0, train_steps: int = 1000) -> list[float]:
    """Return the times of ``FlowMatchEulerDiscreteScheduler(shift=s).set_timesteps(steps)`` in diffusers.

    They differ from :func:`grid` near data. diffusers keeps the training times ``k / train_steps``, shifts
    them, and spaces the sampling times evenly from the largest (1) to the smallest, ``shift(1 /
    train_steps)``; then it shifts once more and appends 0. So its last step starts much closer to 0 than an
    even one.

    Raises:
        UserError: as :func:`grid`.
    """
    grid(steps, shift)
    last = shift_time(1 / train_steps, shift)
    even = np.linspace(1.0, last, steps)
    return [float(shift_time(u, shift)) for u in even] + [0.0]


def uniform(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``n`` times, uniform in [0, 1), float32 ``[n]``."""
    return rng.random(n, dtype=np.float32)


def logit_normal(n: int, rng: np.random.Generator, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """Draw ``n`` times whose logit is normal (arXiv 2403.03206, equation 19), float32 ``[n]``."""
    logits = mean + std * rng.standard_normal(n)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def shifted(density: Density, s: float) -> Density:
    """Return the density of ``shift(u, s)`` with ``u`` drawn from ``density``."""

    def draw(n: int, rng: np.random.Generator) -> np.ndarray:
        return shift_time(density(n, rng), s)

    return draw


def density(name: DensityName, shift: float = 1.0) -> Density:
    """Return the density of this name, shifted towards noise.

    A logit-normal density shifted by ``s`` is one of mean ``log s``: LADD's mean of 1 is ``s = 2.72``.

    Args:
        name: of the density.
        shift: time shift ``s``; 1 leaves the times as they are.

    Raises:
        UserError: the shift is not a positive number.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"the shift of times must be a positive number, not {shift}")
    base = {"uniform": uniform, "logit-normal": logit_normal}[name]
    return base if shift == 1 else shifted(base, shift)
