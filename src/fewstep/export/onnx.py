"""Export as a bundle of ONNX graphs for onnxruntime, which generates without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.export.base import ExportMetadata
from fewstep.export.common.bundle import check_place, write_bundle
from fewstep.export.common.graphs import parts, trace, write_graph
from fewstep.export.common.onnx_quantize import Choose, quantize_weights
from fewstep.families.base import Family

if TYPE_CHECKING:
    from onnx import ModelProto

FAMILIES = ("sd3",)
BITS = (8, 4, 6, 16, 32)
T5 = False
T5_BITS = BITS


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("onnx", "onnxscript")


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    check_place(out)


def export(
    family: Family, out: Path, bits: int, metadata: ExportMetadata, *, t5_bits: int | None = None
) -> str:
    """Write ``family`` as a bundle for onnxruntime (:func:`fewstep.export.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the folder of the bundle.
        bits: bits per weight, one of :data:`BITS` (:mod:`fewstep.export.common.onnx_quantize`).
        metadata: metadata to store.
        t5_bits: bits per weight of T5, one of :data:`T5_BITS`; ``None`` is ``bits``.

    Returns:
        One line that describes the bundle.

    Raises:
        UserError: something else exists at ``out``.
    """

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            part_bits = t5_bits or bits if stem == "t5" else bits
            write_graph(quantize_weights(trace(part), part_bits), folder / f"{stem}.onnx")

    return write_bundle(family, out, bits, metadata, "onnx", write)


def write_traced(
    family: Family,
    traced: Mapping[str, ModelProto],
    out: Path,
    bits: int,
    metadata: ExportMetadata,
    choose: Choose | None = None,
) -> str:
    """Write a bundle of graphs that are already traced, as :func:`export` does.

    ``choose`` is as in :func:`fewstep.export.common.onnx_quantize.quantize_weights`.
    """

    def write(folder: Path) -> None:
        for stem, model in traced.items():
            write_graph(quantize_weights(model, bits, choose), folder / f"{stem}.onnx")

    return write_bundle(family, out, bits, metadata, "onnx", write)
