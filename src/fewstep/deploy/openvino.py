"""A torch family as a bundle of OpenVINO graphs, which generates without torch (floor 3)."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewstep.deploy import Facts
from fewstep.deploy.common.bundle import check_place, write_bundle
from fewstep.deploy.common.graphs import Part, parts, trace, write_graph
from fewstep.families import Family
from fewstep.types import UserError

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
T5 = False
T5_BITS = BITS

GROUP = 32
"""Weights of 4 bits that share a scale."""

SHARE = 0.9
"""Of a graph's other matrices, how many numbers have 4 bits: the matrices that lose most keep 8."""


def check(out: Path) -> None:
    """See :class:`fewstep.deploy.Target`."""
    check_place(out)
    import_module("fewstep.runtime.openvino")


def export(family: Family, out: Path, bits: int, facts: Facts, *, t5_bits: int | None = None) -> str:
    """Write ``family`` as a bundle for OpenVINO (:func:`fewstep.deploy.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight: 16 is float16 throughout, 8 and 4 are NNCF's.
        facts: what it tells of itself.
        t5_bits: of :data:`T5_BITS`, a weight of T5 where the family has it; ``bits`` where ``None``.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, or float16 has no room for a weight.
        ImportError: OpenVINO or NNCF is not installed.
    """
    from fewstep.runtime.openvino import openvino  # which tells nobody

    if 16 in (bits, t5_bits):
        _fits_float16(family)

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            own = t5_bits or bits if stem == "t5" else bits
            graph = _converted(part)
            if own < 16:
                graph = _compressor(own)(graph)
            openvino.save_model(graph, folder / f"{stem}.xml", compress_to_fp16=own == 16)

    return write_bundle(family, out, bits, facts, "openvino", write)


def _fits_float16(family: Family) -> None:
    """OpenVINO would write what is too large as the largest number there is."""
    import torch

    largest = torch.finfo(torch.float16).max
    for part, module in family.parts.items():
        for name, weight in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            if weight.abs().max() > largest:
                raise UserError(f"{part}.{name} has weights too large for float16: give --bits 8")


def _converted(part: Part) -> Any:
    """``part`` as an ``openvino.Model`` with a free batch size, by way of ONNX.

    It is read from a file, which may be larger than a protobuf message.
    """
    from fewstep.runtime.openvino import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file goes before the model does
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write_graph(trace(part), path)
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
