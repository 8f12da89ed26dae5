"""The metadata that an export takes from its source and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.runtime.bundle import CARD


def has_t5(place: Path) -> bool:
    """Whether a model has T5; of what is no folder nobody knows before it is loaded."""
    from fewstep.families.diffusers_io import has_part

    return not (place / "model_index.json").is_file() or has_part(place, "text_encoder_3")


def read_metadata(about: Path | None) -> dict[str, Any]:
    """The facts of ``--metadata``.

    Raises:
        UserError: the file is no JSON object, or its styles are no words.
    """
    from fewstep.families.diffusers_io import read_json

    told = {} if about is None else read_json(about)
    styles = told.get("styles", [])
    if not (isinstance(styles, list) and all(isinstance(style, str) for style in styles)):
        raise UserError(f'{about}: "styles" must be a list of words')
    return told


def facts_of(place: Path, license: str | None, told: Mapping[str, Any]) -> ExportMetadata:
    """What an export of the model at ``place`` tells of itself."""
    text = place / "LICENSE"
    given = text if text.is_file() else None
    card = place / CARD
    name = license or ("unknown" if given is None else "see LICENSE")
    return ExportMetadata(name, given, told, card if card.is_file() else None)
