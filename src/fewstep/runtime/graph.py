"""ONNX graphs on onnxruntime: sessions are made in the background, or on first use."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnxruntime as ort

from fewstep.types import UserError


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Graph:
    """One ONNX graph on the processor.

    Args:
        path: the ``.onnx`` file.
        threads: threads inside one operator.
        convolutions: optimise the graph in full, layout included. Convolutions gain a third by that;
            a transformer gains nothing, and its session takes half as long again to make.
    """

    def __init__(self, path: Path, threads: int, convolutions: bool = False) -> None:
        self.path = path
        self.threads = threads
        self.convolutions = convolutions
        self._maker: Thread | None = None
        self._session: Any = None
        self._error: Exception | None = None

    def start(self) -> Graph:
        """Begin to make the session in the background; onnxruntime lets go of Python's lock meanwhile."""
        if self._maker is None:
            self._maker = Thread(target=self._make, name=self.path.name)
            self._maker.start()
        return self

    def __call__(self, **feeds: np.ndarray) -> list[np.ndarray]:
        """Run the graph on named inputs; its outputs in the graph's order.

        Raises:
            UserError: the file is no graph that onnxruntime can load, or not one for these inputs.
        """
        self.start()
        assert self._maker is not None
        self._maker.join()
        if self._error is not None:
            raise UserError(f"{self.path} cannot be loaded by onnxruntime: {_reason(self._error)}")
        try:
            return self._session.run(None, feeds)
        except Exception as error:  # as above
            raise UserError(f"{self.path} does not fit its bundle: {_reason(error)}") from error

    def _make(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong comes as an exception
        # Threads that wait by spinning cost a quarter of a generation's processor time, and win 3 ms a step
        # only where nothing else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if self.convolutions else level.ORT_ENABLE_BASIC
        )
        try:
            self._session = ort.InferenceSession(
                str(self.path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no narrower base; raised in __call__
            self._error = error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
