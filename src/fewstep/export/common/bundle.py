"""A torch family as a bundle, whichever engine its graphs are for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.core.atomic import FULL, replacing_folder
from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.export.common.manifest import manifest, write_t5_tokenizer, write_tokenizer
from fewstep.export.common.token_lengths import t5_length
from fewstep.families.base import Family
from fewstep.runtime.bundle import CARD, MANIFEST, SUFFIXES, T5_TOKENIZER, Bundle, Engine, write_manifest


def write_bundle(
    family: Family,
    out: Path,
    bits: int,
    metadata: ExportMetadata,
    engine: Engine,
    write: Callable[[Path], None],
) -> str:
    """Write ``family`` as a bundle (:mod:`fewstep.runtime.bundle`).

    Where the family has T5, the bundle has. It is made beside its place and
    renamed, so an interrupted export leaves nothing there; an earlier bundle there is replaced.

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: a weight.
        metadata: what it tells of itself.
        engine: what its graphs are for.
        write: writes them into a folder.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``.
    """

    def fill(fresh: Path) -> None:
        write(fresh)
        write_tokenizer(family, fresh / "tokenizer.json")
        if t5_length(family):
            write_t5_tokenizer(family, fresh / T5_TOKENIZER)
        if metadata.license_file is not None:
            shutil.copyfile(metadata.license_file, fresh / "LICENSE")
        if metadata.card is not None:
            shutil.copyfile(metadata.card, fresh / CARD)

    return _sealed(out, bits, manifest(family, metadata, bits) | {"engine": engine}, fill)


def rewrite_bundle(
    bundle: Bundle, out: Path, bits: int, told: Mapping[str, Any], write: Callable[[Path], None]
) -> str:
    """Write ``bundle`` with other graphs; its tokenizers, licence and card go along.

    Args:
        bundle: for onnxruntime; its files are verified first.
        out: as ``bits`` and ``write`` in :func:`write_bundle`, and what is returned and raised.
        bits: a weight.
        told: the fields of ``bundle.json`` but ``format`` and ``files``.
        write: writes the graphs into a folder.
    """
    if out.exists() and out.samefile(bundle.folder):
        raise UserError(f"{out} is the bundle itself: choose another place")
    bundle.verify()

    def fill(fresh: Path) -> None:
        write(fresh)
        for name in bundle.files:
            if not name.endswith((*SUFFIXES[bundle.engine], ".data")):
                shutil.copyfile(bundle.path(name), fresh / name)

    return _sealed(out, bits, told, fill)


def _sealed(out: Path, bits: int, told: Mapping[str, Any], fill: Callable[[Path], None]) -> str:
    check_place(out)
    try:
        with replacing_folder(out) as fresh:
            fill(fresh)
            bundle = write_manifest(fresh, told)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return f"{bundle.size / 1e6:.1f} MB, {bits}-bit weights"


def check_place(out: Path) -> None:
    """Refuse a place where something else than a bundle lies, before anything is made for it."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no bundle: choose another place")
