"""The compute of a training step, counted in forward passes of its nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class PassCounter:
    """Counts the samples that pass through nets, with a backward pass as two more.

    A guided call counts twice, because its batch is doubled. What a net recomputes in the backward pass is
    not counted.

    Args:
        nets: the nets that run; each is counted once.
    """

    def __init__(self, nets: Sequence[Module]) -> None:
        self._samples = 0
        for net in {id(net): net for net in nets}.values():
            net.register_forward_hook(self._count)

    def _count(self, net: Module, inputs: object, output: Any) -> None:
        first: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        self._samples += len(first) * (3 if first.requires_grad else 1)

    def take(self) -> int:
        """Return the count since the last call, and begin anew."""
        samples, self._samples = self._samples, 0
        return samples
