"""Methods: nets, whose turn it is to learn, and pure losses. A method is one file (floor 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Losses = Mapping[str, Any]
"""Name -> scalar tensor. The trainer minimises their sum; what is only for the log is detached."""


@dataclass(frozen=True)
class Draw:
    """The randomness of one turn, a function of (seed, step, turn) alone: resuming needs no saved state.

    Attributes:
        rng: for what is drawn with numpy (times, which rows lose their caption).
        torch: a ``torch.Generator`` on the CPU for noise, so that it is the same on every device.
    """

    rng: Any
    torch: Any


@dataclass(frozen=True)
class Turn:
    """One update: the net of this name learns from these losses."""

    net: str
    losses: Callable[[Any, Draw], Losses]


class Method(Protocol):
    """What is learnt. Owns no optimizer, no device and no log."""

    @property
    def nets(self) -> Mapping[str, Any]:
        """The nets that learn, by name."""
        ...

    def turns(self, step: int) -> Sequence[Turn]:
        """Whose turn it is at this step, in order."""
        ...
