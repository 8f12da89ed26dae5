"""OpenVINO graphs on OpenVINO's plugin for processors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from threading import Lock
from typing import Any, cast

import numpy as np

from fewstep.runtime.session import Run, Session

# Imported with this at hand, OpenVINO and NNCF write an id into the home folder and tell Google Analytics of
# each use, without asking. Both do without it.
cast("dict[str, Any]", sys.modules)["openvino_telemetry"] = None

import openvino  # noqa: E402


class Graph(Session):
    """One OpenVINO graph on the processor: an ``.xml`` file, its weights beside it in the ``.bin``.

    It computes in float32 whatever its weights are stored in. Activations are not quantized on the way: their
    scales would come from rows of one batch, and a picture would depend on its neighbours.
    """

    ENGINE = "OpenVINO"

    def _load(self) -> Run:
        compiled = _core().compile_model(self.path, "CPU", properties(self.threads))
        request: Any = compiled.create_infer_request()
        lock = Lock()  # a request does one thing at a time

        def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with lock:
                return list(request.infer(dict(feeds), share_inputs=True).values())

        return run


def properties(threads: int) -> dict[str, Any]:
    """Of a graph on the processor, as :class:`Graph` describes."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }


@cache
def _core() -> Any:
    """The process's own; each would load the plugin anew."""
    return openvino.Core()
