"""Parts of a model whose weights come to the device and go (floor 3, torch)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.staged.bare import frozen
from fewstep.staged.fill import Source
from fewstep.staged.process import trim


@dataclass
class Part:
    """A module that has its weights on the device for a while.

    On a CPU they are let go and read again. From a GPU they go to the CPU's memory, and come back from there.

    Attributes:
        module: with or without weights.
        source: of the weights.
        prefix: where the module lies in its net, with a dot at the end.
        here: whether it has them.
    """

    module: Any
    source: Source
    prefix: str = ""
    here: bool = False
    _aside: bool = field(default=False, repr=False)

    def come(self) -> Any:
        """The module, on the device.

        Raises:
            UserError: weights are missing or of another shape.
        """
        if not self.here:
            if self._aside:
                self.module.to(self.source.device)
            else:
                self.source.fill(self.module, self.prefix)
            self.here = True
        return self.module

    def go(self) -> None:
        """Leave the device."""
        if not self.here:
            return
        self.here = False
        if self.source.device != "cpu":
            self.module.to("cpu")
            self._aside = True
            return
        for layer in self.module.modules():
            for name, old in layer.named_parameters(recurse=False):
                layer._parameters[name] = frozen(self._empty(old))
            for name, old in layer.named_buffers(recurse=False):
                if name not in layer._non_persistent_buffers_set:  # those are in no file
                    layer._buffers[name] = self._empty(old)

    def _empty(self, old: Tensor) -> Tensor:
        return torch.empty(old.shape, dtype=self.source.dtype, device="meta")

    @contextmanager
    def visit(self) -> Generator[None]:
        """Within the block the module has its weights; it leaves, if it has come for this."""
        guest = not self.here
        self.come()
        try:
            yield
        finally:
            if guest:
                self.go()


@dataclass
class Place:
    """A device with room for some parts at a time.

    Attributes:
        parts: by name.
        stay: those that do not leave; of the others one at a time is there.
    """

    parts: Mapping[str, Part]
    stay: frozenset[str]

    def settle(self) -> None:
        """Fetch what stays."""
        for name in sorted(self.stay & self.parts.keys()):
            self.parts[name].come()

    def take(self, name: str) -> Any:
        """A part with its weights; the ones that do not stay leave for it."""
        part = self.parts[name]
        if not part.here and name not in self.stay:
            self.leave(other for other in self.parts if other not in self.stay)
        return part.come()

    def leave(self, names: Iterable[str]) -> None:
        """Let parts go, and give the memory back to the system."""
        gone = [self.parts[name] for name in names if self.parts[name].here]
        for part in gone:
            part.go()
        if gone:
            trim()
