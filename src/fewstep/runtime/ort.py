"""ONNX graphs on onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from fewstep.runtime.bundle import Bundle
from fewstep.runtime.session import Run, Session

# Without this, onnxruntime (1.32) writes an id into the home folder and reports each use to Microsoft,
# without asking. Other modules import it from here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

FORMAT = "onnx"
SUFFIXES = (".onnx",)


def open_graph(bundle: Bundle, stem: str, threads: int) -> Session:
    """Return the session of one graph (:class:`fewstep.runtime.engine.RuntimeEngine`)."""
    return Graph(bundle.graph(stem), threads, convolutions=stem in ("decoder", "encoder"))


class Graph(Session):
    """One ONNX graph on the processor.

    Args:
        path: the ``.onnx`` file.
        threads: threads inside one operator.
        convolutions: optimise the graph in full, layout included. Convolutions gain a third;
            a transformer gains nothing, and its session takes 50% longer to load.
    """

    ENGINE = "onnxruntime"

    def __init__(self, path: Path, threads: int, convolutions: bool = False) -> None:
        super().__init__(path, threads)
        self.convolutions = convolutions

    def _load(self) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are exceptions
        # Spinning threads cost a quarter of a generation's processor time, and save 3 ms per step only on an
        # idle machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever its first bytes
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if self.convolutions else level.ORT_ENABLE_BASIC
        )
        session = ort.InferenceSession(
            str(self.path),
            sess_options=options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it would print and retry
        )

        def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            return cast("list[np.ndarray]", session.run(None, dict(feeds)))

        return run
