"""The protocol of a training method: the nets it trains, and the updates of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from fewstep.core.types import WHOLE, BatchSlice

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module, Parameter

Losses: TypeAlias = "Mapping[str, Tensor]"
"""Name to scalar tensor. The trainer minimises their sum; a detached value is only logged."""


@dataclass(frozen=True)
class StepRandom:
    """The randomness of one update, a function of (seed, step, update) alone.

    Resuming a run therefore needs no saved state. What belongs to a sample is drawn for the whole batch and
    cut to this process's slice, so that any number of processes and micro-batches sees the same noise. What
    is shared by a batch, such as a step of the grid, comes from ``rng`` and is the same in every process.

    Attributes:
        rng: draws what the whole batch shares, times and choices.
        torch: draws noise, on its own device: a GPU draws other numbers than a CPU.
        share: which part of the batch this is.
    """

    rng: np.random.Generator
    torch: torch.Generator
    share: BatchSlice = WHOLE

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal noise of the shape ``[B, ...]`` and on the device of ``like``, float32."""
        import torch

        shape = (len(like) * self.share.parts, *like.shape[1:])
        noise = torch.randn(shape, generator=self.torch, device=self.torch.device)
        return noise[self.share.slice_of(shape[0])].to(like.device)

    def times(self, density: Callable[[int, np.random.Generator], Any], like: Tensor) -> Tensor:
        """Return a time for every row of ``like``, ``[B]`` float32.

        Args:
            density: of the times, one of :mod:`fewstep.core.schedule`.
            like: the batch, ``[B, ...]``.
        """
        import torch

        times = density(len(like) * self.share.parts, self.rng)
        return torch.from_numpy(times[self.share.slice_of(len(times))]).to(like.device)

    def choices(self, options: Sequence[int], like: Tensor) -> Tensor:
        """Return one of ``options`` for every row of ``like``, ``[B]`` int64."""
        import torch

        whole = len(like) * self.share.parts
        indices = self.rng.integers(0, len(options), whole)[self.share.slice_of(whole)]
        return torch.tensor(options)[torch.from_numpy(indices)].to(like.device)


@dataclass(frozen=True)
class Update:
    """One optimizer step of the net of this name, and of no other.

    Attributes:
        net: name of the net.
        losses: the batch and the update's randomness to named losses.
    """

    net: str
    losses: Callable[[Any, StepRandom], Losses]


@dataclass(frozen=True)
class InPlaceUpdate:
    """A change of a net without a gradient: a head that is reset, a proxy that follows the student.

    Attributes:
        net: name of the net.
        apply: changes the net in place and returns the parameters whose optimizer state is reset.
    """

    net: str
    apply: Callable[[StepRandom], Sequence[Parameter]]


class Method(Protocol):
    """A training method. It owns no optimizer, no device and no log."""

    @property
    def nets(self) -> Mapping[str, Module]:
        """The nets that are trained, by name."""
        ...

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        """Return the updates of a training step, in order."""
        ...
