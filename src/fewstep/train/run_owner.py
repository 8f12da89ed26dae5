"""Check which run a folder belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.core import json_io
from fewstep.core.types import UserError

RENAMED_RECIPES: dict[str | None, str] = {
    "distill-adversarial": "distill-ladd",
    "distill-consistency": "distill-lcm",
    "pocket-codec": "pocket-vae",
    "pocket-words": "pocket-paraphrases",
}
"""Recipes by the names in run folders of earlier versions."""

RENAMED_PARTS = {"--warm": "--warm-start-steps"}
"""Keys of ``made_of`` by their names in run folders of earlier versions."""


@dataclass(frozen=True)
class _Owner:
    """The keys of ``run.json`` that identify a run."""

    recipe: str | None = None
    made_of: dict[str, Any] = field(default_factory=dict[str, Any])


def check_owner(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Args:
        folder: of the run.
        record: of the run that wants the folder; ``recipe`` and ``made_of`` are compared.

    Raises:
        UserError: the folder holds a run of another recipe or of other frozen parts, or its ``run.json``
            cannot be read.
    """
    note = folder / "run.json"
    if not note.exists():
        return
    try:
        owner = json_io.read(note, _Owner, python=True)
    except UserError as error:
        raise UserError(f"{error}; move it away, or choose another folder with --output") from None
    if RENAMED_RECIPES.get(owner.recipe, owner.recipe) != record.get("recipe"):
        raise UserError(f"{folder} holds a run of {owner.recipe}; choose another folder with --output")
    parts = {RENAMED_PARTS.get(name, name): value for name, value in owner.made_of.items()}
    made_of = record.get("made_of", {})
    if different := [name for name in parts if made_of.get(name) != parts[name]]:
        raise UserError(
            f"{folder} holds a run with another {different[0]}; choose another folder with --output"
        )
