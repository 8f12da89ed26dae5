"""OpenVINO graphs on OpenVINO's CPU plugin."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np

from fewstep.runtime.bundle import Bundle, Compute
from fewstep.runtime.session import Run, Session

# With this module, OpenVINO and NNCF write an id into the home folder and report each use to Google
# Analytics, without asking. Both work without it.
cast("dict[str, object]", sys.modules)["openvino_telemetry"] = None

import openvino  # noqa: E402

GROUP = 64
"""Activations of a token that share a scale if they are quantized. It divides the widths of Pocket and SD3.5.
On Pocket 32 takes a tenth longer, and 256 loses 1.5 dB more."""


FORMAT = "openvino"
SUFFIXES = (".xml", ".bin")


def open_graph(bundle: Bundle, stem: str, threads: int) -> Session:
    """Return the session of one graph (:class:`fewstep.runtime.engine.RuntimeEngine`)."""
    return Graph(bundle.graph(stem), threads, compute_dtype(stem, bundle.compute))


class Graph(Session):
    """One OpenVINO graph on the processor: an ``.xml`` file, its weights beside it in the ``.bin``.

    It computes in float32 by default, whatever type stores its weights.

    Args:
        path: the ``.xml`` file.
        threads: threads inside one operator.
        compute: bfloat16 if the processor has it, else float32. int8 also quantizes the activations that
            meet weights of few bits, with scales per token; the rest is bfloat16.
    """

    ENGINE = "OpenVINO"

    def __init__(self, path: Path, threads: int, compute: Compute = "float32") -> None:
        super().__init__(path, threads)
        self.compute: Compute = compute

    def _load(self) -> Run:
        compiled = _core().compile_model(read(self.path), "CPU", properties(self.threads, self.compute))
        request: Any = compiled.create_infer_request()
        lock = Lock()  # a request runs one inference at a time

        def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with lock:
                return list(request.infer(dict(feeds), share_inputs=True).values())

        return run


def read(path: Path) -> openvino.Model:
    """An ``.xml`` file with its ``.bin`` as an ``openvino.Model``.

    OpenVINO itself goes by the content of the file. It would read an ONNX graph named ``.xml``, with all
    files that the graph names. This function reads only those two files.
    """
    from openvino.frontend import FrontEndManager

    reader: Any = FrontEndManager().load_by_framework("ir")
    return reader.convert(reader.load(str(path)))


def compute_dtype(stem: str, compute: Compute) -> Compute:
    """Return the type that one graph computes in, for a bundle that computes in ``compute``.

    int8 is for products of the net and its modulations. The codec is then bfloat16. Text encoders run once,
    lose most, and stay float32.
    """
    if compute != "int8" or stem in ("modulation", "transformer"):
        return compute
    return "bfloat16" if stem in ("decoder", "encoder") else "float32"


def properties(threads: int, compute: Compute = "float32") -> dict[str, str | int]:
    """Return the properties of a graph on the processor, as :class:`Graph` describes."""
    able = compute != "float32" and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if able else "f32",  # the default would be bf16 if possible
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP if compute == "int8" else 0),
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }


@cache
def _core() -> openvino.Core:
    """Return the core of this process; each core loads the plugin anew."""
    return openvino.Core()
