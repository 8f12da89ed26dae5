"""Export as a diffusers folder, which the diffusers pipelines and other programs load."""

from __future__ import annotations

from pathlib import Path

from fewstep.export.base import ExportMetadata
from fewstep.families.base import Family
from fewstep.families.diffusers_io import check_place

FAMILIES = ("sd3", "flux")
BITS = (32,)
T5 = True


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ()


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    check_place(out)


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write ``family`` as a folder for ``from_pretrained`` of its diffusers pipeline.

    Raises:
        UserError: something else exists at ``out``.
    """
    family.save(out)
    return "for diffusers"
