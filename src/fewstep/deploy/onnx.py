"""A torch family as a bundle of ONNX graphs, which generates without torch (floor 3)."""

from __future__ import annotations

from pathlib import Path

from fewstep.deploy import Facts
from fewstep.deploy.common.bundle import write_bundle
from fewstep.deploy.common.graphs import Part, trace, write_graph
from fewstep.deploy.common.weights import shrink
from fewstep.families import Family

FAMILIES = ("sd3",)
BITS = (8, 4, 6, 16, 32)
T5 = False


def export(family: Family, out: Path, bits: int, facts: Facts) -> str:
    """Write ``family`` as a bundle for onnxruntime (:func:`fewstep.deploy.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight (:mod:`fewstep.deploy.common.weights`).
        facts: what it tells of itself.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``.
    """

    def write(stem: str, part: Part, folder: Path) -> None:
        write_graph(shrink(trace(part), bits), folder / f"{stem}.onnx")

    return write_bundle(family, out, bits, facts, "onnx", write)
