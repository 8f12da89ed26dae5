"""What a GPU was told, told again at once (floor 3, torch).

A step of an MMDiT is a thousand kernels, and Python takes longer to ask for them than a fast GPU takes to
run them. A CUDA graph asks for all of them in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM = 2
"""Runs before the one that is recorded: what is compiled and chosen at a first run is not recorded."""


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: Sequence[Tensor]
    outputs: Any


@dataclass
class CUDAGraphCache:
    """Recordings of computations on a GPU, a recording for each kind of input.

    Recorded is where tensors lie, too: only for modules whose weights stay where they are. All recordings
    share their memory, so that they need what the largest of them does; that is why results are copied, and
    why all are made anew when a larger one comes.
    """

    _made: dict[Any, _Recorded] = field(default_factory=dict[Any, _Recorded])
    _pool: Any = None
    _lock: Any = field(default_factory=Lock)

    def __call__(self, name: str, run: Callable[..., Any], *inputs: Tensor) -> Any:
        """What ``run`` makes of ``inputs``.

        Args:
            name: of the computation, under which it is found again.
            run: tensors of ``inputs``' shapes -> tensors, in any container that torch's pytree knows.
            inputs: tensors on the GPU.
        """
        kind = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with self._lock:
            if kind not in self._made:
                if any(
                    name == other[0] and size(inputs) > size(one.inputs) for other, one in self._made.items()
                ):
                    self._made.clear()
                    self._pool = None
                self._made[kind] = self._record(run, inputs)
            made = self._made[kind]
            for ours, given in zip(made.inputs, inputs, strict=True):
                ours.copy_(given)
            made.graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, made.outputs)

    def _record(self, run: Callable[..., Any], inputs: Sequence[Tensor]) -> _Recorded:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        ours = [tensor.clone() for tensor in inputs]
        aside, usual = _aside(), torch.cuda.current_stream()
        aside.wait_stream(usual)
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                run(*ours)
        usual.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local")
        with torch.cuda.stream(usual), recording:  # a recording that fails does not go back by itself
            outputs = run(*ours)
        return _Recorded(graph, ours, outputs)


def size(tensors: Sequence[Tensor]) -> int:
    """Numbers of all tensors."""
    return sum(tensor.numel() for tensor in tensors)


@cache
def _aside() -> Any:
    """The stream on which all is recorded: cuBLAS keeps a workspace for each that it was used on."""
    return torch.cuda.Stream()
