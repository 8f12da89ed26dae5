"""Methods: nets, whose turn it is to learn, and pure losses. A method is one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fewstep.core.types import WHOLE, BatchSlice

Losses = Mapping[str, Any]
"""Name -> scalar tensor. The trainer minimises their sum; what is only for the log is detached."""


@dataclass(frozen=True)
class StepRandom:
    """The randomness of one turn, a function of (seed, step, turn) alone: resuming needs no saved state.

    What belongs to a sample is drawn for the whole batch and cut to this share, so that any number of
    processes and of micro-batches sees the same noise. What is one for the batch (a step of the grid) comes
    from ``rng`` itself, and so is the same everywhere.

    Attributes:
        rng: a ``numpy.random.Generator``.
        torch: a ``torch.Generator``; where it lies noise is drawn, and a GPU draws other numbers than a CPU.
        share: which part of the batch this is.
    """

    rng: Any
    torch: Any
    share: BatchSlice = WHOLE

    def noise(self, like: Any) -> Any:
        """Standard normal noise of the shape ``[B, ...]`` and on the device of ``like``, float32."""
        import torch

        shape = (len(like) * self.share.parts, *like.shape[1:])
        drawn = torch.randn(shape, generator=self.torch, device=self.torch.device)
        return drawn[self.share.slice_of(shape[0])].to(like.device)

    def times(self, density: Callable[[int, Any], Any], like: Any) -> Any:
        """A time of ``density`` (:mod:`fewstep.core.schedule`) for every row of ``like``: ``[B]`` float32."""
        import torch

        drawn = density(len(like) * self.share.parts, self.rng)
        return torch.from_numpy(drawn[self.share.slice_of(len(drawn))]).to(like.device)

    def choices(self, options: Sequence[int], like: Any) -> Any:
        """One of ``options`` for every row of ``like``: ``[B]`` int64."""
        import torch

        whole = len(like) * self.share.parts
        places = self.rng.integers(0, len(options), whole)[self.share.slice_of(whole)]
        return torch.tensor(options)[torch.from_numpy(places)].to(like.device)


@dataclass(frozen=True)
class Update:
    """One update: the net of this name, and no other, learns from these losses."""

    net: str
    losses: Callable[[Any, StepRandom], Losses]


@dataclass(frozen=True)
class InPlaceUpdate:
    """A change of the net of this name that no gradient makes: a head begun anew, a proxy that follows.

    ``apply`` changes the net in place and returns the parameters whose optimizer shall forget what it knew.
    """

    net: str
    apply: Callable[[StepRandom], Sequence[Any]]


class Method(Protocol):
    """What is learnt. Owns no optimizer, no device and no log."""

    @property
    def nets(self) -> Mapping[str, Any]:
        """The nets that learn, by name."""
        ...

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        """Whose turn it is at this step, in order."""
        ...
