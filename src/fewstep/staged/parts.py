"""Parts of a model whose weights come to the device and go (floor 3, torch)."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.staged.outline import Outline
from fewstep.staged.quantize import quantize
from fewstep.staged.weights import Weights
from fewstep.types import UserError

Change = Callable[[str, Tensor], Tensor]
"""``(name, weight) -> weight``: what is done to a weight before it is cast or quantized."""


def bare(outline: Outline, part: str, dtype: torch.dtype) -> Any:
    """A net with the shapes of its weights and none of their bytes, frozen.

    Raises:
        UserError: its class is unknown, or its configuration makes no net.
    """
    from accelerate import init_empty_weights

    # Buffers of diffusers' nets lie in their files, and a table of positions takes gigabytes to make; those
    # of text encoders are counted up when they are made, and in no file.
    ours = outline.classes[part][0] == "diffusers"
    with torch.device("meta") if ours else init_empty_weights(include_buffers=False):
        net = made(outline, part)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = _parameter(parameter.to(dtype))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = buffer.to(dtype)
    return net.eval()


def made(outline: Outline, part: str) -> Any:
    """A net of its class and configuration, its weights whatever they are.

    Raises:
        UserError: see :func:`bare`.
    """
    library, name = outline.classes[part]
    kind: Any = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise UserError(f"the installed {library} has no {name}, which is the {part}")
    config = dict(outline.configs[part])
    try:
        if library == "diffusers":
            return kind.from_config(config)
        return kind(kind.config_class(**config))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"the configuration of the {part} makes no {name} ({error})") from None


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class Source:
    """Where the weights of a net come from, and what becomes of them.

    Attributes:
        weights: its tensors.
        device: where they go.
        dtype: what they are cast to.
        bits: of the layers ``quantized`` names.
        quantized: names of the linear layers that are stored in ``bits``.
        change: what is done to weights first.
        window: a table of which a part is enough: its name, its shape and the part.
        pixels: lay kernels ``channels_last``, which a CPU convolves in twice the speed and without copies.
    """

    weights: Weights
    device: str
    dtype: torch.dtype
    bits: int = 16
    quantized: frozenset[str] = frozenset()
    change: Change | None = None
    window: tuple[str, tuple[int, ...], tuple[slice, ...]] | None = None
    pixels: bool = False

    def fill(self, module: Any, prefix: str = "") -> None:
        """Give ``module``, which lies at ``prefix`` in the net, its weights.

        Raises:
            UserError: one is missing, or has another shape.
        """
        tied: Mapping[str, str] = getattr(module, "_tied_weights_keys", None) or {}
        for path, layer in module.named_modules():
            for name, old in [*layer.named_parameters(recurse=False), *_meta_buffers(layer)]:
                at = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                if at not in tied:
                    self._set(layer, name, at, old)
            for name, buffer in layer.named_buffers(recurse=False):
                layer._buffers[name] = buffer.to(self.device)  # those that are in no file
            if self.bits < 16 and f"{prefix}{path}" in self.quantized:
                quantize(layer, self.bits, self.device)
        for target, source in tied.items():
            layer, _, name = target.rpartition(".")
            module.get_submodule(layer)._parameters[name] = module.get_parameter(source)

    def _set(self, layer: Any, name: str, at: str, old: Tensor) -> None:
        if self.window is not None and at == self.window[0]:
            _, shape, cut = self.window
            tensor = self.weights.window(at, shape, cut).reshape(1, -1, shape[-1])
        else:
            tensor = self.weights.read(at)
        if tensor.shape != old.shape:
            what = f"{at} has the shape {tuple(tensor.shape)}, not {tuple(old.shape)}"
            raise UserError(f"{self.weights.folder} is another net than its configuration says: {what}")
        if self.change is not None:
            tensor = self.change(at, tensor)
        tensor = tensor.to(self.device, self.dtype)
        if self.pixels and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if name in layer._parameters:
            layer._parameters[name] = _parameter(tensor)
        else:
            layer._buffers[name] = tensor


def _meta_buffers(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in layer.named_buffers(recurse=False) if buffer.is_meta]


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
                layer._parameters[name] = _parameter(self._empty(old))
            for name, old in layer.named_buffers(recurse=False):
                if name not in layer._non_persistent_buffers_set:  # those are in no file
                    layer._buffers[name] = self._empty(old)

    def _empty(self, old: Tensor) -> Tensor:
        return torch.empty(old.shape, dtype=self.source.dtype, device="meta")

    @contextmanager
    def visit(self) -> Generator[None]:
        """Within the block the module has its weights."""
        self.come()
        try:
            yield
        finally:
            self.go()


@dataclass(frozen=True)
class Parts:
    """Several that come and go together."""

    each: Sequence[Part]

    @property
    def here(self) -> bool:
        return all(part.here for part in self.each)

    def come(self) -> None:
        for part in self.each:
            part.come()

    def go(self) -> None:
        for part in self.each:
            part.go()


@dataclass
class Place:
    """A device with room for some parts at a time.

    Attributes:
        parts: by name.
        stay: those that do not leave; of the others one at a time is there.
    """

    parts: Mapping[str, Part | Parts]
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


def trim() -> None:
    """Give back what the C library keeps of freed memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def give_back_at_once() -> None:
    """From here on the C library gives freed tensors of 128 KiB back, where it else learns to keep ever
    larger ones for later."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, 2**17)
        option(M_TRIM_THRESHOLD, 2**17)


class Encoders(Mapping[str, Any]):
    """The parts as a family's text encoder asks for them.

    Args:
        place: where encoders come.
        others: all parts, stand-ins among them.
        names: of the encoders.
    """

    def __init__(self, place: Place, others: Mapping[str, Any], names: Sequence[str]) -> None:
        self._place, self._others, self._names = place, others, names

    def __getitem__(self, name: str) -> Any:
        return OneByOne(self._place, name) if name in self._names else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._others)

    def __len__(self) -> int:
        return len(self._others)


@dataclass(frozen=True)
class OneByOne:
    """A text encoder that comes when it is to read, and reads a prompt at a time: what it says does not
    depend on what else is read, and many prompts need no more memory.

    Attributes:
        place: where it comes.
        name: of its part.
    """

    place: Place
    name: str

    @property
    def config(self) -> Any:
        return self._part.module.config

    @property
    def device(self) -> str:
        return self._part.source.device

    @property
    def _part(self) -> Any:
        return self.place.parts[self.name]

    def __call__(self, ids: Tensor, **options: Any) -> Rows:
        """Token ids ``[B, L]`` -> what the encoder gives for each."""
        encoder = self.place.take(self.name)
        return Rows([_short(encoder(row, **options)) for row in ids.split(1)])


def _short(out: Any) -> Any:
    """An encoder's output with the last of its hidden states alone: a family takes the last but one."""
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = out.hidden_states[-2:]
    return out


@dataclass(frozen=True)
class Rows:
    """Outputs of an encoder for one prompt each, read as one for all."""

    each: Sequence[Any]

    def __getattr__(self, name: str) -> Any:
        found = [getattr(out, name) for out in self.each]
        if isinstance(found[0], tuple):
            return [torch.cat(parts) for parts in zip(*found, strict=True)]
        return torch.cat(found)

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([out[index] for out in self.each])
