"""A torch family as a bundle of ONNX graphs, which generates without torch (floor 3)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.deploy import Facts
from fewstep.deploy.common.graphs import parts, trace, write_graph
from fewstep.deploy.common.manifest import described, write_tokenizer
from fewstep.deploy.common.weights import BitsOf, shrink
from fewstep.families import Family
from fewstep.files import replacing_folder
from fewstep.runtime.bundle import MANIFEST, seal
from fewstep.types import UserError

FAMILIES = ("sd3",)
BITS = (8, 4, 6, 16, 32)
T5 = False


def export(family: Family, out: Path, bits: int, facts: Facts) -> str:
    """Write ``family`` as a bundle (:mod:`fewstep.runtime.bundle`).

    T5 stays out: the graphs see the tokens of the two CLIPs only. The bundle is made beside its place and
    renamed, so an interrupted export leaves nothing there; an earlier bundle there is replaced.

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
    return write_bundle(family, {stem: trace(part) for stem, part in parts(family).items()}, out, bits, facts)


def write_bundle(
    family: Family,
    traced: Mapping[str, Any],
    out: Path,
    bits: int,
    facts: Facts,
    bits_of: BitsOf | None = None,
) -> str:
    """The same of graphs that are traced already, with some weights in other bits (see ``shrink``)."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no bundle: choose another place")
    with replacing_folder(out) as fresh:
        for stem, model in traced.items():
            write_graph(shrink(model, bits, bits_of), fresh / f"{stem}.onnx")
        write_tokenizer(family, fresh / "tokenizer.json")
        if facts.license_file is not None:
            shutil.copyfile(facts.license_file, fresh / "LICENSE")
        bundle = seal(fresh, described(family, facts, bits))
    return f"{bundle.size / 1e6:.1f} MB, {bits}-bit weights"
