"""ExecuTorch programs on ExecuTorch's runtime for Python, which takes torch's tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from fewstep.runtime.bundle import Bundle
from fewstep.runtime.session import Run, Session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of itself: experimental
    from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

_LOCK = Lock()
"""Lock for loading and running: all programs of a process share a thread pool and XNNPACK's memory."""
_POOL: list[int] = []
"""Number of threads of that pool, once it exists."""


FORMAT = "executorch"
SUFFIXES = (".pte",)


def open_graph(bundle: Bundle, stem: str, threads: int) -> Session:
    """Return the session of one graph (:class:`fewstep.runtime.engine.RuntimeEngine`)."""
    return Graph(bundle.graph(stem), threads)


class Graph(Session):
    """One ``.pte`` file, a program for one image. The rows of a batch run one after the other.

    Inputs are positional, in the order of ``export/common/graphs.py``.

    Args:
        path: the ``.pte`` file.
        threads: threads inside one operator; the first graph of a process decides for all.
    """

    ENGINE = "ExecuTorch"

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        with _LOCK:
            if not _POOL:  # once only: loaded programs keep using it
                portable_lib._unsafe_reset_threadpool(threads)
                _POOL.append(threads)

    def _load(self) -> Run:
        with _LOCK:
            method: Any = Runtime.get().load_program(self.path).load_method("forward")

        def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            inputs = [torch.from_numpy(np.ascontiguousarray(array)).split(1) for array in feeds.values()]
            with _LOCK:
                rows = [method.execute(row) for row in zip(*inputs, strict=True)]
            return [torch.cat(outputs).numpy() for outputs in zip(*rows, strict=True)]

        return run
