"""Conversion of torch modules and ONNX graphs to OpenVINO IR (``.xml``, ``.bin``) with compressed weights.

This module imports openvino at import time.
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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fewstep.core.types import UserError
from fewstep.export.common.graphs import GraphSpec, trace, write_graph
from fewstep.runtime.openvino import openvino  # without its telemetry
from fewstep.runtime.session import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUP = 32
"""Number of 4-bit weights that share a scale."""

SHARE = 0.9
"""Fraction of a graph's weights that get 4 bits. The most sensitive matrices keep 8."""


def write(graph: openvino.Model, path: Path, bits: int) -> None:
    """Write an ``openvino.Model`` to ``path`` (``.xml``), with its weights beside it.

    16 bits are float16. NNCF compresses to fewer.

    Raises:
        UserError: the file cannot be written.
        ImportError: ``bits`` is less than 16 and NNCF is not installed.
    """
    if bits < 16:
        graph = _compressor(bits)(graph)
    save(graph, path, bits == 16)


@contextlib.contextmanager
def folded(path: Path, beside: Path | None = None) -> Generator[openvino.Model]:
    """Yield a graph of a bundle for onnxruntime as an ``openvino.Model`` with float32 weights.

    onnxruntime unpacks the weights. OpenVINO 2026.4 accepts the operators that unpack them, but computes
    other values.

    Args:
        path: the ONNX file.
        beside: folder for temporary files; the system's by default.

    Raises:
        UserError: it is no such graph.
        OSError: the disk is full.
    """
    from fewstep.runtime.ort import ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with TemporaryDirectory(dir=beside) as folder:
        unpacked = Path(folder) / "graph.onnx"
        options.optimized_model_filepath = str(unpacked)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "graph.onnx.data"
        )
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            graph = _read(unpacked)
        except Exception as error:  # the engines' exceptions share no narrower base
            why = reason(error)
            if _can_be_read(path):  # then writing failed, for which onnxruntime gives no error of its own
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


def check_float16(parts: Mapping[str, object], advice: str) -> None:
    """Check that all weights fit float16. OpenVINO would clip larger ones without a warning.

    Args:
        parts: parts of a model by name; those that are no modules are skipped.
        advice: the option to suggest in the error.

    Raises:
        UserError: a weight exceeds the range of float16.
    """
    import torch

    largest = torch.finfo(torch.float16).max
    for part, module in parts.items():
        for name, weight in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            if weight.abs().max() > largest:
                raise UserError(f"{part}.{name} has weights too large for float16: give {advice}")


@contextlib.contextmanager
def converted(part: GraphSpec, beside: Path | None = None) -> Generator[openvino.Model]:
    """Yield ``part`` as an ``openvino.Model`` with a dynamic batch size, converted through ONNX.

    The ONNX file may be larger than a protobuf message. The model reads its weights lazily, so it is valid as
    long as the file exists, within the block. ``beside`` is as in :func:`folded`.
    """
    with TemporaryDirectory(dir=beside) as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(trace(part), path)
        yield _read(path)


def _read(path: Path) -> openvino.Model:
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # Windows cannot delete a mapped file
    return core.read_model(path)


def _compressor(bits: int) -> Callable[[openvino.Model], openvino.Model]:
    """Return a function that compresses the weights of an ``openvino.Model``.

    8 bits are int8 with a scale and a zero point per row. 4 bits are int4 with a scale per :data:`GROUP`.
    There, embeddings, kernels, each graph's last matrix and the most sensitive ones (:data:`SHARE`) keep 8
    bits.
    """
    import nncf

    nncf.set_log_level(logging.WARNING)
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == 4:
        adjust = nncf.GroupSizeFallbackMode.ADJUST  # smaller groups if the row length is no multiple
        advanced = nncf.AdvancedCompressionParameters(group_size_fallback_mode=adjust)
        options = {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": GROUP,
            "ratio": SHARE,
            "advanced_parameters": advanced,
        }

    def compress(graph: openvino.Model) -> openvino.Model:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            return nncf.compress_weights(graph, **options)

    return compress


def save(graph: openvino.Model, path: Path, half: bool) -> None:
    """Write a graph, with float16 weights if ``half``.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        openvino.save_model(graph, path, compress_to_fp16=half)
    except RuntimeError as error:
        if "iostream" not in str(error):  # OpenVINO's message for a file that cannot be written
            raise
        raise UserError(f"cannot write {path.name}: is the disk full?") from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, length: int, folder: Path) -> None:
    """Write a transformers tokenizer as a graph that truncates and pads to ``length``.

    The graph truncates twice. GenAI's pipeline disables the tokenizer's truncation and then copies the row
    into a buffer of ``length`` tokens. A row that the second truncation cuts has no end token.

    Raises:
        ImportError: OpenVINO's tokenizers are not installed.
    """
    from openvino import opset13 as ops
    from openvino_tokenizers import convert_tokenizer

    own = copy.deepcopy(tokenizer)  # the conversion sets the length as an attribute
    graph = cast(
        "openvino.Model", convert_tokenizer(own, use_max_padding=True, truncation=True, max_length=length)
    )
    tokens = graph.output("input_ids").get_node()
    row = tokens.input_value(0)
    cut = ops.slice(row, np.array([0]), np.array([length]), np.array([1]), np.array([1]))
    cut.output(0).set_names(row.get_names())
    tokens.input(0).replace_source_output(cut.output(0))
    graph.validate_nodes_and_infer_types()
    save(graph, folder / "openvino_tokenizer.xml", True)
