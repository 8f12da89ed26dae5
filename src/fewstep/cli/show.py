"""The commands ``show`` and ``models``."""

from __future__ import annotations

import json as jsons
from typing import Annotated

from cyclopts import Parameter

from fewstep.core.progress import emit, printable
from fewstep.core.types import UserError
from fewstep.pipeline.resolve import SHIPPED, builtin_models


def show(picture: str, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Print how a picture was made.

    Args:
        picture: An image of fewstep's, or of another program that writes "parameters" as AUTOMATIC1111 does.
        json: Print fewstep's own metadata alone, as one line of JSON.
    """
    from fewstep.images.metadata import CHUNK, PARAMETERS
    from fewstep.images.record import SHEET, read_info, read_json, records_of

    info = read_info(picture)
    if CHUNK not in info and (json or PARAMETERS not in info):
        raise UserError(f"{picture} says nothing of how it was made: no metadata of fewstep's in it")
    facts = read_json(info[CHUNK], picture) if CHUNK in info else {}
    if json:
        return emit(_dumps(facts, picture))
    if SHEET in facts:
        records = records_of(facts, picture)
        for number, record in enumerate(records, 1):
            text = printable(record.parameters(), keep="\n")
            emit(f"image {number} of {len(records)}\n{text}\n")
        return None
    if PARAMETERS in info:
        emit(printable(info[PARAMETERS], keep="\n"))
    if facts:
        emit(_dumps(facts, picture, indent=2))
    return None


def models() -> None:
    """List the models that are installed: size, steps, licence, folder."""
    from fewstep.runtime.bundle import read

    bundles = [read(folder) for folder in builtin_models()]
    if not bundles:
        raise UserError(f"no model is installed in {SHIPPED}: reinstall fewstep, or give --model a folder")
    rows = [("name", "size", "steps", "licence", "folder")]
    rows += [(b.name, f"{b.size / 1e6:.1f} MB", str(b.steps), b.license, str(b.folder)) for b in bundles]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _dumps(facts: object, picture: str, indent: int | None = None) -> str:
    try:
        return jsons.dumps(facts, indent=indent)
    except RecursionError:
        raise UserError(f"the metadata of {picture} is damaged (nested too deeply)") from None
