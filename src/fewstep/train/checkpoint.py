"""Checkpoints: everything that exact resumption needs, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
    unfinished = folder / f"{LAST}.partial"
    try:
        torch.save({"step": state["owner"].step, **held}, unfinished)
        os.replace(unfinished, folder / LAST)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"{folder / LAST} could not be written ({error}); the earlier checkpoint is kept"
        ) from error


def restore(folder: Path, state: dict[str, Any], about: dict[str, Any]) -> int:
    """Load ``folder/last.pt`` into ``state`` where it is there; tells the step to go on from.

    Raises:
        UserError: the folder belongs to another recipe, or the checkpoint is cut short.
    """
    import torch

    note = folder / "run.json"
    if note.exists() and (there := json.loads(note.read_text())).get("recipe") != about.get("recipe"):
        raise UserError(f"{folder} holds a run of {there.get('recipe')}; choose another folder with --out")
    path = folder / LAST
    if not path.exists():
        return 0
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        for group in GROUPS:
            for name, part in state[group].items():
                part.load_state_dict(read[group][name])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        what = str(error).splitlines()[0][:120]
        raise UserError(f"{path} cannot be resumed ({what}); move it away to start anew") from error
    return int(read["step"])
