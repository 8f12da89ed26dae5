"""The commands ``show`` and ``models``."""

from __future__ import annotations

import json as jsons
from typing import Annotated

from cyclopts import Parameter

from fewstep.core.progress import emit, printable
from fewstep.core.types import UserError
from fewstep.pipeline.resolve import SHIPPED, builtin_models

JsonFlag = Annotated[bool, Parameter(negative="")]


def show(image: str, /, *, json: JsonFlag = False) -> None:
    """Print how an image was made.

    Args:
        image: An image of fewstep, or of a program that writes "parameters" as AUTOMATIC1111 does.
        json: Print the metadata of fewstep only, as one line of JSON.
    """
    from fewstep.images.metadata import CHUNK, PARAMETERS
    from fewstep.images.record import SHEET, read_info, read_json, records_of

    info = read_info(image)
    if CHUNK not in info and (json or PARAMETERS not in info):
        raise UserError(f"{image} does not say how it was made: it has no metadata of fewstep")
    metadata = read_json(info[CHUNK], image) if CHUNK in info else {}
    if json:
        return emit(_dumps(metadata, image))
    if SHEET in metadata:
        records = records_of(metadata, image)
        for number, record in enumerate(records, 1):
            text = printable(record.parameters(), keep="\n")
            emit(f"image {number} of {len(records)}\n{text}\n")
        return None
    if PARAMETERS in info:
        emit(printable(info[PARAMETERS], keep="\n"))
    if metadata:
        emit(_dumps(metadata, image, indent=2))
    return None


def models(*, json: JsonFlag = False) -> None:
    """List the installed models: size, steps, licence and folder.

    Args:
        json: Print one JSON object per model. Its size is in bytes.
    """
    from fewstep.runtime.bundle import read

    bundles = [read(folder) for folder in builtin_models()]
    if not bundles:
        raise UserError(f"no model is installed in {SHIPPED}: reinstall fewstep, or give --model a folder")
    if json:
        for b in bundles:
            facts = {"name": b.name, "size": b.size, "steps": b.steps, "license": b.license}
            emit(jsons.dumps({**facts, "folder": str(b.folder)}))
        return
    rows = [("name", "size", "steps", "licence", "folder")]
    rows += [(b.name, f"{b.size / 1e6:.1f} MB", str(b.steps), b.license, str(b.folder)) for b in bundles]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _dumps(metadata: object, image: str, indent: int | None = None) -> str:
    try:
        return jsons.dumps(metadata, indent=indent)
    except RecursionError:
        raise UserError(f"the metadata of {image} is damaged (nested too deeply)") from None
