"""A torch family as a bundle of ONNX graphs, which generates without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.export.base import ExportMetadata
from fewstep.export.common.bundle import check_place, write_bundle
from fewstep.export.common.graphs import parts, trace, write_graph
from fewstep.export.common.onnx_quantize import Choose, quantize_weights
from fewstep.families.base import Family

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
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight (:mod:`fewstep.export.common.onnx_quantize`).
        metadata: what it tells of itself.
        t5_bits: of :data:`T5_BITS`, a weight of T5 where the family has it; ``bits`` where ``None``.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``.
    """

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            own = t5_bits or bits if stem == "t5" else bits
            write_graph(quantize_weights(trace(part), own), folder / f"{stem}.onnx")

    return write_bundle(family, out, bits, metadata, "onnx", write)


def write_traced(
    family: Family,
    traced: Mapping[str, Any],
    out: Path,
    bits: int,
    metadata: ExportMetadata,
    choose: Choose | None = None,
) -> str:
    """The same of graphs that are traced already, some weights stored in another way (see ``shrink``)."""

    def write(folder: Path) -> None:
        for stem, model in traced.items():
            write_graph(quantize_weights(model, bits, choose), folder / f"{stem}.onnx")

    return write_bundle(family, out, bits, metadata, "onnx", write)
