"""Parts of a model whose weights come to the device and go (floor 3, torch)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.inference.host_memory import trim
from fewstep.inference.materialize import WeightLoader
from fewstep.inference.meta_init import frozen_parameter
from fewstep.modules.memory_tracker import ALLOCATED

CHUNK = 2**28
"""Bytes of the CPU's memory that are asked for at once: of memory that a GPU reads by itself torch gives
powers of two, for a weight up to twice what it needs."""


@dataclass
class PinnedBuffer:
    """The CPU's memory for weights that have left a GPU, which reads them there by itself; where the system
    gives no more of such memory, any other."""

    _chunk: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _used: int = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor, copied here; it has no gaps."""
        size = -(-tensor.nbytes // ALLOCATED) * ALLOCATED
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _pinned(max(CHUNK, size)), 0
        room = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype)
        self._used += size
        return room.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class _Kept:
    """A tensor on the shelf, and where a module has it."""

    held: dict[str, Any]
    name: str
    tensor: Tensor


@dataclass
class OffloadedModule:
    """A module that has its weights on the device for a while.

    On a CPU they are let go and read again. What has left a GPU once is kept on a shelf, and comes back from
    there.

    Attributes:
        module: with or without weights.
        source: of the weights.
        shelf: for those that leave a GPU.
        prefix: where the module lies in its net, with a dot at the end.
        stays: after a visit.
        here: whether it has them.
    """

    module: Any
    source: WeightLoader
    shelf: PinnedBuffer = field(default_factory=PinnedBuffer)
    prefix: str = ""
    stays: bool = False
    here: bool = False
    _aside: list[_Kept] = field(default_factory=list[_Kept], repr=False)
    _arrival: Any = field(default=None, repr=False)

    def load(self) -> Any:
        """The module, on the device.

        Raises:
            UserError: weights are missing or of another shape.
        """
        if not self.here:
            if self._aside:
                self._fetch(lambda tensor: tensor.to(self.source.device, non_blocking=True))
            else:
                self.source.fill(self.module, self.prefix)
            self.here = True
        self._arrive()
        return self.module

    def prefetch(self) -> None:
        """Begin to come back to a GPU that does other things meanwhile; where it has no room, do not."""
        if self.here or not self._aside:
            return
        path = _path(self.source.device)
        path.wait_stream(torch.cuda.current_stream())  # whoever had the room has used it until then

        def begun(tensor: Tensor) -> Tensor:
            room = torch.empty_like(tensor, device=self.source.device)
            room.record_stream(path)  # so that nobody else gets it while it is written
            with torch.cuda.stream(path):
                return room.copy_(tensor, non_blocking=True)

        with suppress(torch.OutOfMemoryError):
            self._fetch(begun)
            self._arrival = path.record_event()
            self.here = True

    def _arrive(self) -> None:
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None

    def offload(self) -> None:
        """Leave the device."""
        if not self.here:
            return
        self._arrive()
        if self.source.device != "cpu":
            if not self._aside:
                self._aside = self._kept()
            self._put(lambda tensor: tensor)
        else:
            for layer in self.module.modules():
                for name, old in layer.named_parameters(recurse=False):
                    layer._parameters[name] = frozen_parameter(self._empty(old))
                for name, old in layer.named_buffers(recurse=False):
                    if name not in layer._non_persistent_buffers_set:  # those are in no file
                        layer._buffers[name] = self._empty(old)
        self.here = False

    def _kept(self) -> list[_Kept]:
        copies: dict[int, Tensor] = {}  # a tied weight is one tensor in several places
        kept: list[_Kept] = []
        for layer in self.module.modules():
            for held in (layer._parameters, layer._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in copies:
                        copy = self.shelf.copy(tensor.detach())
                        copies[id(tensor)] = (
                            frozen_parameter(copy) if isinstance(tensor, nn.Parameter) else copy
                        )
                    kept.append(_Kept(held, name, copies[id(tensor)]))
        return kept

    def _fetch(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Put what ``moved`` makes of the tensors aside, all or none of it."""
        try:
            self._put(moved)
        except BaseException:
            self._put(lambda tensor: tensor)
            raise

    def _put(self, moved: Callable[[Tensor], Tensor]) -> None:
        made: dict[int, Tensor] = {}
        for one in self._aside:
            key = id(one.tensor)
            if key not in made:
                tensor = moved(one.tensor)
                made[key] = frozen_parameter(tensor) if isinstance(one.tensor, nn.Parameter) else tensor
            one.held[one.name] = made[key]

    def _empty(self, old: Tensor) -> Tensor:
        return torch.empty(old.shape, dtype=self.source.dtype, device="meta")

    @contextmanager
    def resident(self) -> Generator[None]:
        """Within the block the module has its weights; it leaves afterwards, unless it stays."""
        self.load()
        try:
            yield
        finally:
            if not self.stays:
                self.offload()


@cache
def _path(device: str) -> Any:
    """The stream on which weights come while the device works on another."""
    return torch.cuda.Stream(device)


@dataclass
class OffloadManager:
    """A device with room for some parts at a time.

    Attributes:
        parts: by name.
        stay: those that do not leave; of the others one at a time is there.
    """

    parts: Mapping[str, OffloadedModule]
    stay: frozenset[str]

    def load_resident(self) -> None:
        """Fetch what stays."""
        for name in sorted(self.stay & self.parts.keys()):
            self.parts[name].load()

    def acquire(self, name: str) -> Any:
        """A part with its weights; the ones that do not stay leave for it."""
        part = self.parts[name]
        if not part.here and name not in self.stay:
            self.evict(other for other in self.parts if other not in self.stay)
        return part.load()

    def acquire_exclusive(self, name: str) -> Any:
        """The same for a part that needs the room even where it stays itself."""
        self.evict(other for other in self.parts if other not in self.stay and other != name)
        return self.acquire(name)

    def evict(self, names: Iterable[str]) -> None:
        """Let parts go, and give the memory back to the system."""
        gone = [self.parts[name] for name in names if self.parts[name].here]
        for part in gone:
            part.offload()
        if any(part.source.device == "cpu" for part in gone):
            trim()
