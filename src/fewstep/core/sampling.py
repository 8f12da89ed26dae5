"""The generation loop: noise by seed, solver steps, and the latents that they end in.

:func:`generate_latents` alone assembles the loop: it makes the noise of the seeds, mixes in the latents of an
input image, prepares the steps and takes them. The pipeline adds text encoding and decoding. Benchmarks time
it through the pipeline. Training previews, teacher sampling and calibration call it with conditions and a
velocity of their own. :class:`Hooks` observe it. It is in the lowest layer, so every package can call it.

The noise comes from one counter-based generator per image. A seed therefore gives the same image in every
batch and on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from fewstep.core.flow import expand_time, interpolate, to_x0
from fewstep.core.types import Array, Cond, Model, PreparableVelocity, Sampler, Step, UserError, Velocity

T = TypeVar("T")

OnStep = Callable[[int, float, Array], None]
"""``on_step(index, t_next, x0_estimate)``: called in each step with the predicted clean latents."""

OnState = Callable[[int, Array], None]
"""``on_state(index, x)``: called with the latents at ``grid[index]``; index 0 is the start."""


class StageRunner(Protocol):
    """Runs one stage of generation, such as a timer around it."""

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Return ``work()``. ``name`` is ``text``, ``modulation``, ``steps`` or ``decode``."""
        ...


def run_stage(name: str, work: Callable[[], T]) -> T:
    """Run a stage and do nothing else."""
    return work()


@dataclass(frozen=True)
class Hooks:
    """Observers of the generation loop. None of them changes the result.

    Attributes:
        on_step: sees the predicted clean latents of each step, for previews.
        on_state: sees the latents at each time of the grid, for trajectories.
        stage: runs the stages, for timing.
    """

    on_step: OnStep | None = None
    on_state: OnState | None = None
    stage: StageRunner = run_stage


class StepRule(Protocol):
    """A solver step along a velocity."""

    def __call__(self, x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
        """``x [B, ...]`` and its velocity at ``t`` -> ``x`` at ``t_next``; ``index`` counts from 0."""
        ...


def noise(seed: int, shape: Sequence[int], stream: int = 0) -> np.ndarray:
    """Return the standard normal noise of one image, float32 of ``shape`` (``C, H, W``).

    Args:
        seed: 0 to 2**64 - 1.
        shape: shape of the image's latents.
        stream: independent noise of the same seed; 0 is the noise that generation starts from.

    Raises:
        UserError: the seed is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must lie between 0 and 2**64 - 1, not {seed}")
    rng = np.random.Generator(np.random.Philox(key=seed + (stream << 64)))
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def batch_noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> np.ndarray:
    """Return the noise of several images, float32 ``[B, C, H, W]``: one row per seed."""
    return np.stack([noise(seed, shape, stream) for seed in seeds])


def euler(x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
    """Take the deterministic step ``x + (t_next - t) v``."""
    return x + (t_next - t) * v


def renoise(seeds: Sequence[int], from_numpy: Callable[[np.ndarray], Array] = np.asarray) -> StepRule:
    """Return the stochastic step: estimate ``x_0``, then mix it with fresh noise at ``t_next``.

    This is multistep consistency sampling (Song et al., arXiv 2303.01469, algorithm 1) on the rectified flow.

    Args:
        seeds: one per image; the noise is a function of (seed, step) alone.
        from_numpy: numpy float32 array -> the array kind of the latents (``Model.from_numpy``).
    """

    def step(x: Array, v: Array, t: float, t_next: float, index: int) -> Array:
        fresh = from_numpy(batch_noise(seeds, x.shape[1:], stream=index + 1))
        return interpolate(to_x0(x, v, t), fresh, t_next)

    return step


def step_rule(
    sampler: Sampler, seeds: Sequence[int], from_numpy: Callable[[np.ndarray], Array] = np.asarray
) -> StepRule:
    """Return the step rule of a sampler for the images of these seeds."""
    return renoise(seeds, from_numpy) if sampler == "renoise" else euler


def prepare_steps(velocity: Velocity, times: Sequence[float], cond: Cond) -> Sequence[Step]:
    """Return the velocity at each of ``times``, prepared for these conditions if it can be."""
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
    rule: StepRule = euler,
    hooks: Hooks = Hooks(),
) -> Array:
    """Integrate the flow from ``x`` along the grid.

    Args:
        velocity: the net.
        x: ``[B, C, H, W]`` at time ``grid[0]``; float32, also for a net of half precision.
        grid: descending times (:func:`fewstep.core.schedule.grid`); a single time takes no step.
        cond: conditions of the ``B`` samples.
        rule: how a step is taken.
        hooks: observers.

    Returns:
        ``x`` at ``grid[-1]``, ``[B, C, H, W]``.
    """
    steps: Sequence[Step] = ()
    if len(grid) > 1:
        steps = hooks.stage("modulation", lambda: prepare_steps(velocity, grid[:-1], cond))

    def solve() -> Array:
        state = x
        if hooks.on_state is not None:
            hooks.on_state(0, state)
        for index, (t, t_next) in enumerate(pairwise(grid)):
            v = steps[index](state)
            if hooks.on_step is not None:
                hooks.on_step(index, t_next, to_x0(state, v, t))
            state = rule(state, v, t, t_next, index)
            if hooks.on_state is not None:
                hooks.on_state(index + 1, state)
        return state

    return hooks.stage("steps", solve)


def generate_latents(
    model: Model,
    cond: Cond,
    seeds: Sequence[int],
    grid: Sequence[float],
    *,
    velocity: Velocity | None = None,
    sampler: Sampler | None = None,
    start: Array | None = None,
    hooks: Hooks = Hooks(),
) -> Array:
    """Generate the latents of one batch, from the noise of the seeds to the end of the grid.

    Args:
        model: gives the latents' shape and the array kind, and the net and the sampler by default.
        cond: conditions of the ``B`` images.
        seeds: one per image.
        grid: descending times.
        velocity: another velocity than the model's: guided, of a student, of an exported graph.
        sampler: another sampler than the model's.
        start: clean latents of an input image, ``[1, C, H, W]``, for image-to-image.
        hooks: observers.

    Returns:
        latents ``[B, C, H, W]`` at ``grid[-1]``, of the model's array kind.
    """
    x = model.from_numpy(batch_noise(seeds, model.latent))
    if start is not None:
        x = interpolate(start[[0] * len(seeds)], x, grid[0])
    rule = step_rule(sampler or model.sampler, seeds, model.from_numpy)
    return sample_flow(velocity or model.velocity, x, grid, cond, rule, hooks)
