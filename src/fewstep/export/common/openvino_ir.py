"""OpenVINO's graphs: from a torch module to an ``.xml`` file with its ``.bin``, in few bits.

This file imports openvino when it is imported.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import logging
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fewstep.core.types import UserError
from fewstep.export.common.graphs import GraphSpec, trace, write_graph
from fewstep.runtime.openvino import openvino  # which tells nobody
from fewstep.runtime.session import reason

GROUP = 32
"""Weights of 4 bits that share a scale."""

SHARE = 0.9
"""Of a graph's other matrices, how many numbers have 4 bits: the matrices that lose most keep 8."""


def write(graph: Any, path: Path, bits: int) -> None:
    """Write an ``openvino.Model`` to ``path`` (``.xml``) and its weights beside it, 16 of ``bits`` being
    float16.

    Raises:
        UserError: it cannot be written.
        ImportError: NNCF, which makes fewer bits, is not installed.
    """
    if bits < 16:
        graph = _compressor(bits)(graph)
    save(graph, path, bits == 16)


@contextlib.contextmanager
def folded(path: Path, beside: Path | None = None) -> Generator[Any]:
    """A graph of a bundle for onnxruntime as an ``openvino.Model``, its weights unpacked to float32.

    onnxruntime unpacks them, as it does to draw: OpenVINO reads the operators that do it, and draws something
    else (2026.4).

    Args:
        path: of the graph.
        beside: a folder for what is needed meanwhile; the system's by default.

    Raises:
        UserError: it is no such graph.
        OSError: there is no room for it.
    """
    from fewstep.runtime.ort import ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with TemporaryDirectory(dir=beside) as folder:
        plain = Path(folder) / "graph.onnx"
        options.optimized_model_filepath = str(plain)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "graph.onnx.data"
        )
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            graph = _read(plain)
        except Exception as error:  # the engines' exceptions share no narrower base
            why = reason(error)
            if _can_be_read(path):  # then what failed is the writing, of which onnxruntime says little
                raise OSError(errno.ENOSPC, f"is the disk full? ({why})", folder) from error
            raise UserError(f"{path} cannot be unpacked by onnxruntime: {why}") from error
        yield graph


def _can_be_read(path: Path) -> bool:
    from fewstep.runtime.ort import ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # as above
        return False
    return True


def check_float16(parts: Mapping[str, Any], instead: str) -> None:
    """OpenVINO would write what is too large as the largest number there is.

    Args:
        parts: modules by name, and what is none.
        instead: what is to be given where one of them has such a weight.
    """
    import torch

    largest = torch.finfo(torch.float16).max
    for part, module in parts.items():
        for name, weight in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            if weight.abs().max() > largest:
                raise UserError(f"{part}.{name} has weights too large for float16: give {instead}")


@contextlib.contextmanager
def converted(part: GraphSpec, beside: Path | None = None) -> Generator[Any]:
    """``part`` as an ``openvino.Model`` with a free batch size, by way of ONNX.

    It is read from a file, which may be larger than a protobuf message; its weights are read when they are
    needed, so that it holds no longer than the file. ``beside`` is as in :func:`folded`.
    """
    with TemporaryDirectory(dir=beside) as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(trace(part), path)
        yield _read(path)


def _read(path: Path) -> Any:
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # not every system lets go of a file that is mapped
    return core.read_model(path)


def _compressor(bits: int) -> Callable[[Any], Any]:
    """A function from an ``openvino.Model`` to itself with smaller weights.

    They become int8 with a scale and a zero point a row; at 4 bits int4 with a scale for each :data:`GROUP`,
    but for embeddings, kernels, each graph's last matrix and what NNCF finds to lose most (:data:`SHARE`).
    """
    import nncf

    nncf.set_log_level(logging.WARNING)
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == 4:
        adjust = nncf.GroupSizeFallbackMode.ADJUST  # smaller groups where rows are no multiple
        advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=adjust)
        options = {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": GROUP,
            "ratio": SHARE,
            "advanced_parameters": advanced,
        }

    def compress(graph: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # its bars of progress
            return nncf.compress_weights(graph, **options)

    return compress


def save(graph: Any, path: Path, half: bool) -> None:
    """Write a graph, its weights in float16 where ``half``.

    Raises:
        UserError: it cannot be written.
    """
    try:
        openvino.save_model(graph, path, compress_to_fp16=half)
    except RuntimeError as error:
        if "iostream" not in str(error):  # which is all that it tells of a file that cannot be written
            raise
        raise UserError(f"cannot write {path.name}: is the disk full?") from error


def write_tokenizer(tokenizer: Any, length: int, folder: Path) -> None:
    """Write a tokenizer of transformers as a graph, which cuts and pads to ``length``.

    It cuts twice: GenAI's pipeline switches off the tokenizer's own cutting, and then copies a longer row to
    where there is room for one of ``length``. What is cut the second time has no end token.

    Raises:
        ImportError: OpenVINO's tokenizers are not installed.
    """
    from openvino import opset13 as ops
    from openvino_tokenizers import convert_tokenizer

    own = copy.deepcopy(tokenizer)  # the length becomes its attribute
    graph: Any = convert_tokenizer(own, use_max_padding=True, truncation=True, max_length=length)
    tokens = graph.output("input_ids").get_node()
    row = tokens.input_value(0)
    cut = ops.slice(row, np.array([0]), np.array([length]), np.array([1]), np.array([1]))
    cut.output(0).set_names(row.get_names())
    tokens.input(0).replace_source_output(cut.output(0))
    graph.validate_nodes_and_infer_types()
    save(graph, folder / "openvino_tokenizer.xml", True)
