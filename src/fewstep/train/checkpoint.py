"""Checkpoints: everything that exact resumption needs, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fewstep.files import replacing_file
from fewstep.types import UserError

LAST = "last.pt"
GROUPS = ("nets", "optimizers", "averages")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``folder/last.pt`` under a temporary name, then rename it over the earlier one.

    Raises:
        UserError: the disk is full or refuses; the earlier checkpoint is untouched.
    """
    import torch

    held = {group: {name: part.state_dict() for name, part in state[group].items()} for group in GROUPS}
    try:
        with replacing_file(folder / LAST) as fresh:
            torch.save({"step": state["owner"].step, **held}, fresh)
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())  # else a power cut could leave the new name with no content
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder / LAST} could not be written ({error}); the earlier checkpoint is kept"
        ) from error


def restore(folder: Path, state: dict[str, Any], about: dict[str, Any]) -> int:
    """Load ``folder/last.pt`` into ``state`` where it is there; tells the step to go on from.

    Raises:
        UserError: the folder belongs to another recipe or to other frozen parts (``about["made_of"]``), or
            the checkpoint is cut short.
    """
    import torch

    note = folder / "run.json"
    try:
        there = json.loads(note.read_text()) if note.exists() else about
        if not isinstance(there, dict):
            raise ValueError(note)
    except (OSError, ValueError) as error:
        raise UserError(f"{note} is damaged; move it away, or choose another folder with --out") from error
    if there.get("recipe") != about.get("recipe"):
        raise UserError(f"{folder} holds a run of {there.get('recipe')}; choose another folder with --out")
    mine, theirs = about.get("made_of", {}), there.get("made_of", {})
    if others := [part for part in theirs if mine.get(part) != theirs[part]]:
        raise UserError(f"{folder} holds a run with another {others[0]}; choose another folder with --out")
    path = folder / LAST
    if not path.exists():
        return 0
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        for group in GROUPS:
            for name, part in state[group].items():
                part.load_state_dict(read[group][name])
        return int(read["step"])
    except Exception as error:  # a damaged pickle can raise anything
        what = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{path} cannot be resumed ({type(error).__name__} {what}); move it away to start anew"
        ) from error
