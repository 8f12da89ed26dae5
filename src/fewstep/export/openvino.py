"""A torch family, or a bundle for onnxruntime, as a bundle of OpenVINO graphs, which generates without torch
(floor 3)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

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
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight: 16 is float16 throughout, 8 and 4 are NNCF's. Where
            ``metadata.compute`` is int8 text encoders (T5 too, unless told otherwise) have 16, modulations 8.
        metadata: what it tells of itself.
        t5_bits: of :data:`T5_BITS`, a weight of T5 where the family has it; those of the other texts where
            ``None``.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, float16 has no room for a weight, or int8 is asked of
            weights of 16 bits.
        ImportError: OpenVINO or NNCF is not installed.
    """
    from fewstep.export.common import openvino_ir

    own = _bits(bits, metadata.compute) | ({"t5": t5_bits} if t5_bits else {})
    of_part = {"text_encoder": own["text"], "text_encoder_2": own["text"], "text_encoder_3": own["t5"]}
    halves = {name: part for name, part in family.parts.items() if of_part.get(name, bits) == 16}
    other = "--compute float32" if metadata.compute == "int8" else "--bits 8" if bits == 16 else "--t5 8"
    openvino_ir.check_float16(halves, other)

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            with openvino_ir.converted(part, folder.parent) as graph:
                openvino_ir.write(graph, folder / f"{stem}.xml", own.get(stem, bits))

    return write_bundle(family, out, bits, metadata, "openvino", write)


def convert(bundle: Bundle, out: Path, bits: int, told: Mapping[str, Any]) -> str:
    """See :class:`fewstep.export.base.ConvertsBundle`.

    Raises:
        UserError: something else lies at ``out``, int8 is asked of weights of 16 bits, or the bundle is
            damaged.
        ImportError: OpenVINO is not installed, or NNCF, which makes fewer bits than 16.
    """
    from fewstep.export.common import openvino_ir

    own = _bits(bits, told.get("compute", "float32"))
    if bits < 16:
        import_module("nncf")

    def write(folder: Path) -> None:
        for name in bundle.files:
            stem, _, ending = name.rpartition(".")
            if ending == "onnx":
                with openvino_ir.folded(bundle.graph(stem), folder.parent) as graph:
                    openvino_ir.write(graph, folder / f"{stem}.xml", own.get(stem, bits))

    return rewrite_bundle(bundle, out, bits, {**told, "engine": "openvino"}, write)


def _bits(bits: int, compute: Compute) -> dict[str, int]:
    """Of the graphs that have others than the rest.

    What quantizes activations makes levels of a last digit, and texts in fewer bits than 16, modulations in
    fewer than 8, are not the same to the last digit in every batch.

    Raises:
        UserError: int8 is asked of weights of 16 bits.
    """
    if compute == "int8" and bits == 16:
        raise UserError("--compute int8 multiplies weights of 8 or 4 bits: give --bits 8")
    texts, modulation = (16, 8) if compute == "int8" else (bits, bits)
    return {"text": texts, "t5": texts, "modulation": modulation}
