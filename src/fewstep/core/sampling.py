"""Samplers: noise by seed, and the walk from noise to data.

Noise comes from one counter-based generator an image, so that a seed is the same picture in every
batch and on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from fewstep.core.flow import expand_time, interpolate, to_x0
from fewstep.core.types import Array, Cond, PreparableVelocity, Sampler, Step, UserError, Velocity

OnStep = Callable[[int, float, Array], None]
"""``on_step(index, t_next, x0_estimate)``: called after each step with the predicted clean latents."""


class StepRule(Protocol):
    """How a walk moves along a velocity."""

    def __call__(self, x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
        """``x [B, ...]`` and its velocity at ``t`` -> ``x`` at ``t_next``; ``index`` counts from 0."""
        ...


def noise(seed: int, shape: Sequence[int], stream: int = 0) -> np.ndarray:
    """Standard normal noise of one image, float32 of ``shape`` (``C, H, W``).

    Args:
        seed: 0 to 2**64 - 1.
        shape: shape of the image's latents.
        stream: independent noise of the same seed; 0 is the one that a walk starts from.

    Raises:
        UserError: the seed is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must lie between 0 and 2**64 - 1, not {seed}")
    rng = np.random.Generator(np.random.Philox(key=seed + (stream << 64)))
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def batch_noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> np.ndarray:
    """The noise of several images, float32 ``[B, C, H, W]``; row ``i`` depends on ``seeds[i]`` alone."""
    return np.stack([noise(seed, shape, stream) for seed in seeds])


def euler(x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
    """The deterministic step ``x + (t_next - t) v``."""
    return x + (t_next - t) * v


def renoise(seeds: Sequence[int], lift: Callable[[np.ndarray], Array] = np.asarray) -> StepRule:
    """The stochastic step: estimate ``x_0``, then mix it with fresh noise at ``t_next``.

    This is multistep consistency sampling (Song et al., arXiv 2303.01469, algorithm 1) on the rectified flow.

    Args:
        seeds: one seed an image; the noise is a function of (seed, step) alone.
        lift: numpy float32 array -> the array kind of the walk (``Model.lift``).
    """

    def move(x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
        fresh = lift(batch_noise(seeds, x.shape[1:], stream=index + 1))
        return interpolate(to_x0(x, v, t), fresh, t_next)

    return move


def step_rule(
    sampler: Sampler, seeds: Sequence[int], lift: Callable[[np.ndarray], Array] = np.asarray
) -> StepRule:
    """How a model whose ``sampler`` this is takes a step, on pictures of these seeds."""
    return renoise(seeds, lift) if sampler == "renoise" else euler


def prepare_steps(velocity: Velocity, times: Sequence[float], cond: Cond) -> Sequence[Step]:
    """The velocity at each of ``times``, prepared for these conditions where it can be."""
    if isinstance(velocity, PreparableVelocity):
        return velocity.steps(times, cond)

    def at(t: float) -> Step:
        return lambda x: velocity(x, expand_time(t, x), cond)

    return [at(t) for t in times]


def sample_flow(
    velocity: Velocity,
    x: Array,
    grid: Sequence[float],
    cond: Cond,
    move: StepRule = euler,
    on_step: OnStep | None = None,
) -> Array:
    """Walk ``x`` down the grid.

    Args:
        velocity: the net.
        x: ``[B, C, H, W]`` at time ``grid[0]``; float32, also for a net of half precision.
        grid: descending times (``times.grid``); one time alone is a walk of no step.
        cond: conditions of the ``B`` samples.
        move: how one step moves.
        on_step: sees the predicted clean latents after each step (a preview).

    Returns:
        ``x`` at ``grid[-1]``, ``[B, C, H, W]``.
    """
    steps = prepare_steps(velocity, grid[:-1], cond) if len(grid) > 1 else ()
    for index, (t, t_next) in enumerate(pairwise(grid)):
        v = steps[index](x)
        if on_step is not None:
            on_step(index, t_next, to_x0(x, v, t))
        x = move(x, v, t, t_next, index)
    return x
