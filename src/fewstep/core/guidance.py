"""Classifier-free guidance as a wrapper that is itself a velocity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.core.sampling import prepare_steps
from fewstep.core.types import Array, Cond, Step, UserError, Velocity


@dataclass(frozen=True)
class Guided:
    """``uncond + scale (cond - uncond)`` (Ho and Salimans, arXiv 2207.12598), in one call of a doubled batch.

    Attributes:
        velocity: the net.
        uncond: conditions without the prompt; one row for all samples, or one row per sample. The
            context is as long as that of the conditions.
        scale: guidance scale; 1 is no guidance and needs no second pass.

    Raises:
        UserError: the scale is not a finite number.
    """

    velocity: Velocity
    uncond: Cond
    scale: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance must be a finite number, not {self.scale}")

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> the guided velocity, ``[B, C, H, W]``."""
        if self.scale == 1:
            return self.velocity(x_t, t, cond)
        return self._mixed(self.velocity(_join([x_t, x_t]), _join([t, t]), self._both(cond)))

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """Return the guided velocity at each of ``times``, prepared if the net can be."""
        if self.scale == 1:
            return prepare_steps(self.velocity, times, cond)

        def guided(step: Step) -> Step:
            return lambda x: self._mixed(step(_join([x, x])))

        return [guided(step) for step in prepare_steps(self.velocity, times, self._both(cond))]

    def _both(self, cond: Cond) -> Cond:
        """Return the conditions of the doubled batch: first without, then with the prompt."""
        uncond = self.uncond
        if len(uncond) == 1:
            uncond = uncond.map(lambda array: array[[0] * len(cond)])
        return Cond(_join([uncond.context, cond.context]), _join([uncond.pooled, cond.pooled]))

    def _mixed(self, v: Array) -> Array:
        rows = v.shape[0] // 2
        return v[:rows] + self.scale * (v[rows:] - v[:rows])


def _join(arrays: Sequence[Array]) -> Array:
    """Concatenate along the batch."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import torch  # a tensor came in, so torch is loaded already

    return torch.cat(list(arrays))
