"""A torch family as a bundle of OpenVINO graphs, which generates without torch (floor 3)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fewstep.deploy import Facts
from fewstep.deploy.common.bundle import check_place, write_bundle
from fewstep.deploy.common.graphs import parts
from fewstep.families import Family
from fewstep.runtime.bundle import Compute
from fewstep.types import UserError

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
COMPUTES: tuple[Compute, ...] = ("float32", "bfloat16", "int8")
T5 = False
T5_BITS = BITS


def check(out: Path) -> None:
    """See :class:`fewstep.deploy.Target`."""
    check_place(out)
    import_module("fewstep.runtime.openvino")


def export(family: Family, out: Path, bits: int, facts: Facts, *, t5_bits: int | None = None) -> str:
    """Write ``family`` as a bundle for OpenVINO (:func:`fewstep.deploy.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight: 16 is float16 throughout, 8 and 4 are NNCF's. Where
            ``facts.compute`` is int8 text encoders (T5 too, unless told otherwise) have 16, modulations 8.
        facts: what it tells of itself.
        t5_bits: of :data:`T5_BITS`, a weight of T5 where the family has it; those of the other texts where
            ``None``.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, float16 has no room for a weight, or int8 is asked of
            weights of 16 bits.
        ImportError: OpenVINO or NNCF is not installed.
    """
    from fewstep.deploy.common import ir

    if facts.compute == "int8" and bits == 16:
        raise UserError("--compute int8 multiplies weights of 8 or 4 bits: give --bits 8")
    # What quantizes activations makes levels of a last digit, and texts in fewer bits than 16, modulations in
    # fewer than 8, are not the same to the last digit in every batch.
    texts, modulation = (16, 8) if facts.compute == "int8" else (bits, bits)
    own = {"text": texts, "t5": t5_bits or texts, "modulation": modulation}
    of_part = {"text_encoder": texts, "text_encoder_2": texts, "text_encoder_3": own["t5"]}
    halves = {name: part for name, part in family.parts.items() if of_part.get(name, bits) == 16}
    other = "--compute float32" if facts.compute == "int8" else "--bits 8" if bits == 16 else "--t5 8"
    ir.check_float16(halves, other)

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            ir.write(part, folder / f"{stem}.xml", own.get(stem, bits))

    return write_bundle(family, out, bits, facts, "openvino", write)
