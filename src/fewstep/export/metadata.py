"""The metadata that an export takes from its source and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.runtime.bundle import CARD


def has_t5(place: Path) -> bool:
    """Return whether a model has T5. A source without a diffusers index is assumed to have it."""
    from fewstep.families.diffusers_io import has_part

    return not (place / "model_index.json").is_file() or has_part(place, "text_encoder_3")


def read_metadata(path: Path | None) -> dict[str, object]:
    """Read the file of ``--metadata``; ``None`` gives no metadata.

    Raises:
        UserError: the file is no JSON object, or its styles are no list of texts.
    """
    from fewstep.families.diffusers_io import read_json

    about = {} if path is None else read_json(path)
    styles = about.get("styles", [])
    if not (isinstance(styles, list) and all(isinstance(style, str) for style in styles)):
        raise UserError(f'{path}: "styles" must be a list of words')
    return about


def source_metadata(place: Path, license: str | None, about: Mapping[str, object]) -> ExportMetadata:
    """Return the metadata of an export of the model at ``place``, with its licence and model card."""
    file, card = place / "LICENSE", place / CARD
    license_file = file if file.is_file() else None
    name = license or ("unknown" if license_file is None else "see LICENSE")
    return ExportMetadata(name, license_file, about, card if card.is_file() else None)
