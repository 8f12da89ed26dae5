"""Two nets, one for early and one for late times, and their merge into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.core.types import Array, Cond, Velocity

if TYPE_CHECKING:
    from torch import Tensor

BORDER = 0.5
"""The time at which SD3.5-Flash splits (arXiv 2509.21318): early up to it, late above."""


@dataclass(frozen=True)
class TimestepExperts:
    """A velocity that uses ``late`` above :data:`BORDER` and ``early`` otherwise. A batch has one time.

    Attributes:
        early: the velocity for t in (0, border], near data.
        late: the velocity for t in (border, 1], near noise.
    """

    early: Velocity
    late: Velocity

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        late = t > BORDER
        if bool(late.any()) != bool(late.all()):
            raise ValueError("a batch of times on both sides of the border has no branch")
        return (self.late if bool(late.all()) else self.early)(x_t, t, cond)


def split_grid(grid: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return the steps of a grid that start at early and at late times. Either list may be empty."""
    starts = list(enumerate(grid[:-1]))
    return [i for i, t in starts if t <= BORDER], [i for i, t in starts if t > BORDER]


def merge(early: Mapping[str, Tensor], late: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Interpolate two state dicts: ``ratio`` of ``late`` and the rest of ``early``, in float32.

    Raises:
        ValueError: the state dicts are of different nets.
    """
    if early.keys() != late.keys():
        raise ValueError("only two branches of one net can be merged")
    return {
        name: (early[name].float().lerp(late[name].float(), ratio)).to(early[name].dtype)
        if early[name].is_floating_point()
        else early[name]
        for name in early
    }
