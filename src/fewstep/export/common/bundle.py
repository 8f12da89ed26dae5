"""Writing of a bundle, for any engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

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
    """Write ``family`` as a bundle (:mod:`fewstep.runtime.bundle`), with T5 if the family has it.

    The bundle is written beside ``out`` and then renamed, so that an interrupted export leaves nothing there.
    An earlier bundle at ``out`` is replaced.

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the folder of the bundle.
        bits: bits per weight.
        metadata: metadata to store.
        engine: the engine of the graphs.
        write: writes the graphs into a folder.

    Returns:
        One line that describes the bundle.

    Raises:
        UserError: something else exists at ``out``.
    """

    def fill(folder: Path) -> None:
        write(folder)
        write_tokenizer(family, folder / "tokenizer.json")
        if t5_length(family):
            write_t5_tokenizer(family, folder / T5_TOKENIZER)
        if metadata.license_file is not None:
            shutil.copyfile(metadata.license_file, folder / "LICENSE")
        if metadata.card is not None:
            shutil.copyfile(metadata.card, folder / CARD)

    return _write(out, bits, manifest(family, metadata, bits) | {"engine": engine}, fill)


def rewrite_bundle(
    bundle: Bundle, out: Path, bits: int, fields: Mapping[str, object], write: Callable[[Path], None]
) -> str:
    """Write a copy of ``bundle`` with other graphs. Tokenizers, licence and model card are copied.

    Args:
        bundle: a bundle for onnxruntime, whose files are verified first.
        out: the folder of the new bundle.
        bits: bits per weight.
        fields: the fields of the new ``bundle.json`` but ``format`` and ``files``.
        write: writes the graphs into a folder.

    Returns:
        One line that describes the new bundle.

    Raises:
        UserError: something else exists at ``out``, or the bundle is damaged.
    """
    if out.exists() and out.samefile(bundle.folder):
        raise UserError(f"{out} is the bundle itself: choose another place")
    bundle.verify()

    def fill(folder: Path) -> None:
        write(folder)
        for name in bundle.files:
            if not name.endswith((*SUFFIXES[bundle.engine], ".data")):
                shutil.copyfile(bundle.path(name), folder / name)

    return _write(out, bits, fields, fill)


def _write(out: Path, bits: int, fields: Mapping[str, object], fill: Callable[[Path], None]) -> str:
    check_place(out)
    try:
        with replacing_folder(out) as folder:
            fill(folder)
            bundle = write_manifest(folder, fields)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    return f"{bundle.size / 1e6:.1f} MB, {bits}-bit weights"


def check_place(out: Path) -> None:
    """Check that ``out`` is free or a bundle.

    Raises:
        UserError: something else exists there.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no bundle: choose another place")
