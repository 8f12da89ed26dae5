"""Counts memory while a computation runs, on real tensors or on tensors without data.

Every storage that an operation makes is counted until it is freed. Under :func:`fake_tensors` torch's
``FakeTensorMode`` computes shapes alone, so that a net of any size runs on any machine. Memory that an
operation allocates and frees internally is not counted: see :data:`WORKSPACE`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard, TypeVar
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Net = TypeVar("Net", bound=torch.nn.Module)

ALLOCATED = 512
"""Bytes to which torch's CUDA allocator rounds every tensor up (c10/cuda/CUDACachingAllocator.h,
``kMinBlockSize``)."""

WORKSPACE = 128 * 2**20
"""Bytes that matrix products hold beside tensors on a GPU: cuBLAS's and cuBLASLt's workspaces, 32 MiB each on
Hopper for each of the two threads that multiply (forward and backward)."""

KINDS: tuple[str, ...] = ("frozen", "learning", "gradients", "optimizer", "averages", "activations")
"""Uses of memory. ``activations`` is everything that is none of the others, including the batch."""


@dataclass
class Peak:
    """Bytes of each kind (:data:`KINDS`) at the peak."""

    held: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(self.held.values())


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until it is freed.

    Args:
        shapes: the tensors are fake. Operations that need a value get 1, and random fills do nothing.
        unit: sizes are rounded up to multiples of these bytes.
    """

    def __init__(self, *, shapes: bool = False, unit: int = 1) -> None:
        super().__init__()
        self._shapes, self._unit = shapes, unit
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}
        self.live = dict.fromkeys(KINDS, 0)
        self.peaks: dict[str, Peak] = {}
        self.turn = ""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if self._shapes:
            name = func.overloadpacket.__name__
            if name == "_local_scalar_dense":
                return 1.0
            if name in ("uniform_", "normal_"):  # their stand-ins for fake tensors would make copies
                return args[0]
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                self.track(made)
            elif isinstance(made, tuple | list):  # a list among several outputs
                for one in made:
                    if isinstance(one, torch.Tensor):
                        self.track(one)
        return out

    def track(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage. A ``kind`` replaces that of a storage that is counted already."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata  # pyright: ignore[reportPrivateUsage]
        known = self._known.get(key)
        if known is None:
            size = -(-storage.nbytes() // self._unit) * self._unit
            held = weakref.ref(storage, partial(self._free, key))
            self._known[key] = (held, kind or "activations", size)
            self.live[kind or "activations"] += size
            self._note()
        elif kind is not None and kind != known[1]:
            self.live[known[1]] -= known[2]
            self.live[kind] += known[2]
            self._known[key] = (known[0], kind, known[2])

    def begin(self, turn: str) -> None:
        """Attribute peaks to this turn from here on."""
        self.turn = turn
        self._note()

    def _note(self) -> None:
        peak = self.peaks.get(self.turn)
        if peak is None or sum(self.live.values()) > peak.total:
            self.peaks[self.turn] = Peak(dict(self.live))

    def _free(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is reference:  # another storage may have the same address by now
            del self._known[key]
            self.live[known[1]] -= known[2]


def _stay(net: Net, *where: object, **how: object) -> Net:
    return net


@contextmanager
def fake_tensors(*, gpu: bool) -> Generator[MemoryTracker]:
    """Within the block tensors are fake: shapes without bytes.

    Args:
        gpu: count as a GPU would hold them (:func:`simulate_cuda`); otherwise as this CPU would.
    """
    from torch._subclasses import FakeTensorMode

    ledger = MemoryTracker(shapes=True, unit=ALLOCATED if gpu else 1)
    with ExitStack() as stack:
        # Modules of fake tensors cannot be moved where anything watches them; here there is one place to be.
        stack.enter_context(patch.object(torch.nn.Module, "to", _stay))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if gpu:
            stack.enter_context(simulate_cuda())
        yield stack.enter_context(ledger)


def cast_parameters(net: Net, dtype: torch.dtype | None = None) -> Net:
    """The net with its weights and buffers copied one by one.

    Fake ones refuse ``Module.to``, and by ``deepcopy`` get a storage that is not the one their views have.
    """
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fresh = p.detach().to(dtype, copy=True)
            setattr(module, name, torch.nn.Parameter(fresh, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(dtype if buffer.is_floating_point() else None, copy=True))
    return net


WIDENED = (
    *("layer_norm", "rms_norm", "group_norm", "softplus", "rsqrt", "reciprocal", "exp", "log", "expm1"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor"),
)
"""Operations that autocast computes in float32 on a GPU and lets be on a CPU (``AT_FORALL_FP32`` of torch's
ATen/autocast_mode.h, as far as nets and losses here use them)."""

SUMMED = ("sum", "sum.dim_IntList")
"""Those whose results alone are float32 there (``AT_FORALL_FP32_SET_OPT_DTYPE``)."""


@contextmanager
def simulate_cuda() -> Generator[None]:
    """Within the block fake tensors of the CPU are handled as CUDA ones: autocast's rules and attention's
    kernel.

    Fake tensors that call themselves CUDA's would be simpler, but torch builds without CUDA have no backward
    pass for them.
    """
    from torch.library import _scoped_library  # pyright: ignore[reportPrivateUsage]

    by_rows = patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention)
    with _scoped_library("aten", "IMPL") as library, by_rows:
        for names, rule in ((WIDENED, _widened), (SUMMED, _summed)):
            for name in names:
                library.impl(name, partial(rule, _overload(name)), "AutocastCPU")
        yield


def _overload(name: str) -> Callable[..., torch.Tensor]:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _beneath() -> AbstractContextManager[object]:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # pyright: ignore[reportPrivateUsage]
    return torch._C._ExcludeDispatchKeyGuard(key)  # pyright: ignore[reportPrivateUsage]


def _narrow(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widened(function: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
    with _beneath():
        return function(*(a.float() if _narrow(a) else a for a in args), **kwargs)


def _summed(function: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
    if _narrow(args[0]) and kwargs.get("dtype") is None:
        kwargs["dtype"] = torch.float32
    with _beneath():
        return function(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """By the kernels that a GPU takes: they keep a number a row, and no matrix."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if _narrow(query) and attn_mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
