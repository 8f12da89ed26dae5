"""A torch family as a bundle of OpenVINO graphs, which generates without torch (floor 3)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fewstep.deploy import Facts
from fewstep.deploy.common.bundle import check_place, write_bundle
from fewstep.deploy.common.graphs import parts
from fewstep.families import Family
from fewstep.runtime.bundle import Compute

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
COMPUTES: tuple[Compute, ...] = ("float32", "bfloat16")
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
        bits: of :data:`BITS`, a weight: 16 is float16 throughout, 8 and 4 are NNCF's.
        facts: what it tells of itself.
        t5_bits: of :data:`T5_BITS`, a weight of T5 where the family has it; ``bits`` where ``None``.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, or float16 has no room for a weight.
        ImportError: OpenVINO or NNCF is not installed.
    """
    from fewstep.deploy.common import ir

    if 16 in (bits, t5_bits):
        ir.check_float16(family)

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            own = t5_bits or bits if stem == "t5" else bits
            ir.write(part, folder / f"{stem}.xml", own)

    return write_bundle(family, out, bits, facts, "openvino", write)
