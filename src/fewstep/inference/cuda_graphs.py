"""CUDA graphs: capture and replay of a model's computations.

A step of an MMDiT launches a thousand kernels, and Python needs longer to launch them than a fast GPU to run
them. A CUDA graph launches all of them in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")

WARMUP_RUNS = 2
"""Runs before the capture, in which code is compiled and kernels are selected."""


@dataclass(frozen=True)
class _CapturedGraph:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    outputs: Any


@dataclass
class CUDAGraphCache:
    """CUDA graphs of computations, one for each name and shapes of inputs.

    A graph contains the addresses of tensors, so the modules' weights must not move. All graphs share one
    memory pool, which is as large as the largest needs. Therefore outputs are copied, and a computation with
    larger inputs clears the cache.
    """

    _graphs: dict[tuple[object, ...], _CapturedGraph] = field(
        default_factory=dict[tuple[object, ...], _CapturedGraph]
    )
    _pool: Any = None
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, name: str, run: Callable[..., T], *inputs: Tensor) -> T:
        """Run a computation, captured at its first call and replayed afterwards.

        Args:
            name: name of the computation.
            run: takes tensors of the shapes of ``inputs`` and returns tensors in any pytree.
            inputs: tensors on the GPU.

        Returns:
            The output of ``run``, copied.
        """
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with self._lock:
            if key not in self._graphs:
                if any(
                    name == other[0] and size(inputs) > size(graph.inputs)
                    for other, graph in self._graphs.items()
                ):
                    self._graphs.clear()
                    self._pool = None
                self._graphs[key] = self._capture(run, inputs)
            captured = self._graphs[key]
            for static, tensor in zip(captured.inputs, inputs, strict=True):
                static.copy_(tensor)
            captured.graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, captured.outputs)

    def _capture(self, run: Callable[..., object], inputs: Sequence[Tensor]) -> _CapturedGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = [tensor.clone() for tensor in inputs]
        side, current = _capture_stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                run(*static)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local")
        with torch.cuda.stream(current), capture:  # a failed capture does not restore the stream
            outputs = run(*static)
        return _CapturedGraph(graph, static, outputs)


def size(tensors: Sequence[Tensor]) -> int:
    """Return the number of elements of all tensors."""
    return sum(tensor.numel() for tensor in tensors)


@cache
def _capture_stream() -> torch.cuda.Stream:
    """The stream of all captures. cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream()
