"""The commands ``show`` and ``models`` (floor 5)."""

from __future__ import annotations

import json as jsons
from typing import Annotated

from cyclopts import Parameter

from fewstep.generate import emit
from fewstep.source import SHIPPED, shipped
from fewstep.types import UserError


def show(picture: str, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Print how a picture was made.

    Args:
        picture: A PNG of fewstep's, or of another program that writes a "parameters" chunk.
        json: Print fewstep's own metadata alone, as one line of JSON.
    """
    from fewstep.picture import CHUNK, PARAMETERS, read_info

    info = read_info(picture)
    if CHUNK not in info and (json or PARAMETERS not in info):
        raise UserError(f"{picture} says nothing of how it was made: no metadata of fewstep's in it")
    if json:
        return emit(jsons.dumps(_facts(picture, info[CHUNK])))
    if PARAMETERS in info:
        emit("".join(sign if sign.isprintable() or sign == "\n" else " " for sign in info[PARAMETERS]))
    if CHUNK in info:
        emit(jsons.dumps(_facts(picture, info[CHUNK]), indent=2))


def models() -> None:
    """List the models that are installed: size, steps, licence, folder."""
    from fewstep.runtime.bundle import read

    bundles = [read(folder) for folder in shipped()]
    if not bundles:
        raise UserError(f"no model is installed in {SHIPPED}: reinstall fewstep, or give --model a folder")
    rows = [("name", "size", "steps", "licence", "folder")]
    rows += [(b.name, f"{b.size / 1e6:.1f} MB", str(b.steps), b.license, str(b.folder)) for b in bundles]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _facts(picture: str, text: str) -> object:
    try:
        facts = jsons.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"the metadata of {picture} is damaged")
    return facts
