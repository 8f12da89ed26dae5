"""Offloading of a model's parts: weights are loaded to the device when needed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.inference.host_memory import trim
from fewstep.inference.materialize import WeightLoader
from fewstep.inference.meta_init import frozen_parameter
from fewstep.modules.memory_tracker import ALLOCATED

CHUNK = 2**28
"""Bytes of pinned memory per allocation.

Torch rounds pinned allocations up to powers of two. Single weights would take up to twice their size."""


@dataclass
class PinnedBuffer:
    """Pinned CPU memory for weights that are offloaded from a GPU.

    Where the system provides no more pinned memory, pageable memory is used.
    """

    _chunk: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _used: int = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a dense tensor to the buffer and return the copy."""
        size = -(-tensor.nbytes // ALLOCATED) * ALLOCATED
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _pinned(max(CHUNK, size)), 0
        target = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype)
        self._used += size
        return target.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class _HostTensor:
    """A tensor in the pinned buffer, and its place in a module.

    Attributes:
        owner: the parameters or buffers of a layer.
        name: its name there.
        tensor: the copy in the buffer.
    """

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor


@dataclass
class OffloadedModule:
    """A module whose weights are on the device only while needed.

    Weights offloaded from a GPU are copied to pinned memory once and are loaded from there. On a CPU they are
    freed and read from the file again.

    Attributes:
        module: the module, with weights or on the meta device.
        source: reads the weights.
        host_buffer: pinned memory for offloaded weights.
        prefix: path of the module in its net, with a dot at the end.
        stays_loaded: whether the weights resident_parts loaded after :meth:`resident`.
        loaded: whether the weights are loaded.
    """

    module: nn.Module
    source: WeightLoader
    host_buffer: PinnedBuffer = field(default_factory=PinnedBuffer)
    prefix: str = ""
    stays_loaded: bool = False
    loaded: bool = False
    _host_tensors: list[_HostTensor] = field(default_factory=list[_HostTensor], repr=False)
    _arrival: torch.Event | None = field(default=None, repr=False)

    def load(self) -> nn.Module:
        """Load the weights if needed and return the module.

        Raises:
            UserError: weights are missing or of another shape.
        """
        if not self.loaded:
            if self._host_tensors:
                self._fetch(lambda tensor: tensor.to(self.source.device, non_blocking=True))
            else:
                self.source.fill(self.module, self.prefix)
            self.loaded = True
        self._arrive()
        return self.module

    def prefetch(self) -> None:
        """Start an asynchronous load to the GPU. Without free memory nothing happens."""
        if self.loaded or not self._host_tensors:
            return
        stream = _copy_stream(self.source.device)
        stream.wait_stream(torch.cuda.current_stream())  # earlier kernels may still use the memory

        def start_copy(tensor: Tensor) -> Tensor:
            target = torch.empty_like(tensor, device=self.source.device)
            target.record_stream(stream)  # keeps the memory allocated until the copy is done
            with torch.cuda.stream(stream):
                return target.copy_(tensor, non_blocking=True)

        with suppress(torch.OutOfMemoryError):
            self._fetch(start_copy)
            self._arrival = stream.record_event()
            self.loaded = True

    def _arrive(self) -> None:
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None

    def offload(self) -> None:
        """Remove the weights from the device."""
        if not self.loaded:
            return
        self._arrive()
        if self.source.device != "cpu":
            if not self._host_tensors:
                self._host_tensors = self._copy_to_host()
            self._put(lambda tensor: tensor)
        else:
            for layer in cast("Iterable[Any]", self.module.modules()):
                for name, old in layer.named_parameters(recurse=False):
                    layer._parameters[name] = frozen_parameter(self._empty(old))
                for name, old in layer.named_buffers(recurse=False):
                    if name not in layer._non_persistent_buffers_set:  # files do not contain the others
                        layer._buffers[name] = self._empty(old)
        self.loaded = False

    def _copy_to_host(self) -> list[_HostTensor]:
        copies: dict[int, Tensor] = {}  # a tied weight is one tensor in several places
        tensors: list[_HostTensor] = []
        for layer in cast("Iterable[Any]", self.module.modules()):
            for owner in (layer._parameters, layer._buffers):
                for name, tensor in owner.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in copies:
                        copy = self.host_buffer.copy(tensor.detach())
                        copies[id(tensor)] = (
                            frozen_parameter(copy) if isinstance(tensor, nn.Parameter) else copy
                        )
                    tensors.append(_HostTensor(owner, name, copies[id(tensor)]))
        return tensors

    def _fetch(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Set the module's tensors to ``moved`` of the host tensors, all or none of them."""
        try:
            self._put(moved)
        except BaseException:
            self._put(lambda tensor: tensor)
            raise

    def _put(self, moved: Callable[[Tensor], Tensor]) -> None:
        results: dict[int, Tensor] = {}
        for host in self._host_tensors:
            key = id(host.tensor)
            if key not in results:
                tensor = moved(host.tensor)
                results[key] = frozen_parameter(tensor) if isinstance(host.tensor, nn.Parameter) else tensor
            host.owner[host.name] = results[key]

    def _empty(self, old: Tensor) -> Tensor:
        return torch.empty(old.shape, dtype=self.source.dtype, device="meta")

    @contextmanager
    def resident(self) -> Generator[None]:
        """Load the weights for the block, and offload them afterwards unless they resident_parts."""
        self.load()
        try:
            yield
        finally:
            if not self.stays_loaded:
                self.offload()


@cache
def _copy_stream(device: str) -> torch.cuda.Stream:
    """The stream of asynchronous loads."""
    return torch.cuda.Stream(device)


@dataclass
class OffloadManager:
    """Loads and offloads the parts of a model.

    Attributes:
        parts: the parts by name.
        resident_parts: names of the resident parts. Of the others, one at a time is loaded.
    """

    parts: Mapping[str, OffloadedModule]
    resident_parts: frozenset[str]

    def load_resident(self) -> None:
        """Load the resident parts."""
        for name in sorted(self.resident_parts & self.parts.keys()):
            self.parts[name].load()

    def acquire(self, name: str) -> nn.Module:
        """Load a part and return its module. Other parts are offloaded unless they are resident."""
        part = self.parts[name]
        if not part.loaded and name not in self.resident_parts:
            self.evict(other for other in self.parts if other not in self.resident_parts)
        return part.load()

    def acquire_exclusive(self, name: str) -> nn.Module:
        """Load a part as :meth:`acquire` does, and offload other parts even if this one is resident."""
        self.evict(other for other in self.parts if other not in self.resident_parts and other != name)
        return self.acquire(name)

    def evict(self, names: Iterable[str]) -> None:
        """Offload parts and return their memory to the system."""
        evicted = [self.parts[name] for name in names if self.parts[name].loaded]
        for part in evicted:
            part.offload()
        if any(part.source.device == "cpu" for part in evicted):
            trim()
