"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a sharded tensor, or the whole tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EMA:
    """An exponential average of some parameters, kept in float32 whatever they are.

    It warms up, so that it forgets the random start: the decay of update ``n`` is
    ``min(decay, (1 + n) / (10 + n))``, and the first update copies. Element by element, so a sharded
    parameter has a sharded average.

    Args:
        parameters: by name. The average keeps hold of them.
        decay: the share that an update keeps, once warm.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self._of = dict(parameters)
        self._decay = decay
        self.values = {
            name: p.detach().to(torch.float32, copy=True).requires_grad_(False)
            for name, p in self._of.items()
        }
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current parameters."""
        mine = [local(v) for v in self.values.values()]
        now = [local(p).to(torch.float32) for p in self._of.values()]
        keep = min(self._decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        if keep:
            torch._foreach_lerp_(mine, now, 1 - keep)  # pyright: ignore[reportPrivateUsage]
        else:
            torch._foreach_copy_(mine, now)  # pyright: ignore[reportPrivateUsage]
        self.count += 1

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Set the parameters to their averages permanently."""
        for name, p in self._of.items():
            local(p).copy_(local(self.values[name]))

    @contextmanager
    def applied(self) -> Generator[None]:
        """Set the parameters to their averages within the block, and restore them bit for bit after it.

        The two change places, one parameter at a time: no second copy of a net. Only those of another
        precision than the average's are copied first, because rounding an average to them cannot be undone.
        """
        saved = {n: local(p).detach().clone() for n, p in self._of.items() if p.dtype != torch.float32}
        self._exchange(saved)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    local(self._of[name]).copy_(value)
            self._exchange(saved, back=True)

    @torch.no_grad()
    def _exchange(self, saved: Mapping[str, torch.Tensor], back: bool = False) -> None:
        for name, p in self._of.items():
            mine, its = local(self.values[name]), local(p)
            if name not in saved:
                held = its.clone()
                its.copy_(mine)
                mine.copy_(held)
            elif not back:
                its.copy_(mine)
