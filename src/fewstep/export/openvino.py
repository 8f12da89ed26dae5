"""Export as a bundle of OpenVINO graphs, which generates without PyTorch.

The source is a PyTorch family or a bundle for onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.export.common.bundle import check_place, rewrite_bundle, write_bundle
from fewstep.export.common.graphs import parts
from fewstep.families.base import Family
from fewstep.runtime.bundle import Bundle, Compute

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
COMPUTES: tuple[Compute, ...] = ("float32", "bfloat16", "int8")
T5 = False
T5_BITS = BITS


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("openvino", *(("nncf",) if bits < 16 else ()))


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    check_place(out)
    import_module("fewstep.runtime.openvino")


def export(
    family: Family, out: Path, bits: int, metadata: ExportMetadata, *, t5_bits: int | None = None
) -> str:
    """Write ``family`` as a bundle for OpenVINO (:func:`fewstep.export.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the folder of the bundle.
        bits: bits per weight, one of :data:`BITS`. 16 is float16; 8 and 4 are compressed by NNCF. Where
            ``metadata.compute`` is int8 the text encoders have 16 and the modulations 8.
        metadata: metadata to store.
        t5_bits: bits per weight of T5, one of :data:`T5_BITS`; ``None`` is those of the text encoders.

    Returns:
        One line that describes the bundle.

    Raises:
        UserError: something else exists at ``out``, a weight exceeds the range of float16, or int8 is
            requested with weights of 16 bits.
        ImportError: OpenVINO or NNCF is not installed.
    """
    from fewstep.export.common import openvino_ir

    graph_bits = _graph_bits(bits, metadata.compute) | ({"t5": t5_bits} if t5_bits else {})
    encoder_bits = {
        "text_encoder": graph_bits["text"],
        "text_encoder_2": graph_bits["text"],
        "text_encoder_3": graph_bits["t5"],
    }
    in_float16 = {name: part for name, part in family.parts.items() if encoder_bits.get(name, bits) == 16}
    advice = "--compute float32" if metadata.compute == "int8" else "--bits 8" if bits == 16 else "--t5 8"
    openvino_ir.check_float16(in_float16, advice)

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            with openvino_ir.converted(part, folder.parent) as graph:
                openvino_ir.write(graph, folder / f"{stem}.xml", graph_bits.get(stem, bits))

    return write_bundle(family, out, bits, metadata, "openvino", write)


def convert(bundle: Bundle, out: Path, bits: int, fields: Mapping[str, object]) -> str:
    """See :class:`fewstep.export.base.ConvertsBundle`.

    Raises:
        UserError: something else exists at ``out``, int8 is requested with weights of 16 bits, or the bundle
            is damaged.
        ImportError: OpenVINO is not installed, or NNCF, which fewer bits than 16 require.
    """
    from fewstep.export.common import openvino_ir

    graph_bits = _graph_bits(bits, cast("Compute", fields.get("compute", "float32")))
    if bits < 16:
        import_module("nncf")

    def write(folder: Path) -> None:
        for name in bundle.files:
            stem, _, ending = name.rpartition(".")
            if ending == "onnx":
                with openvino_ir.folded(bundle.graph(stem), folder.parent) as graph:
                    openvino_ir.write(graph, folder / f"{stem}.xml", graph_bits.get(stem, bits))

    return rewrite_bundle(bundle, out, bits, {**fields, "engine": "openvino"}, write)


def _graph_bits(bits: int, compute: Compute) -> dict[str, int]:
    """Return the bits per weight of the graphs that may differ from the others.

    Quantized activations magnify differences in the last digit. With text encoders below 16 bits or
    modulations below 8, an image would depend on its batch.

    Raises:
        UserError: int8 is requested with weights of 16 bits.
    """
    if compute == "int8" and bits == 16:
        raise UserError("--compute int8 multiplies weights of 8 or 4 bits: give --bits 8")
    text, modulation = (16, 8) if compute == "int8" else (bits, bits)
    return {"text": text, "t5": text, "modulation": modulation}
