"""Run folders of trainings, as other commands see them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUN = "run.json"


CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class _Options:
    steps: int = 0


@dataclass(frozen=True)
class _RunFile:
    """The target of a run in ``run.json``; that of a chain has none."""

    options: _Options = _Options()


def unfinished(folder: Path) -> str | None:
    """The line for the folder of a run that has written nothing yet; ``None`` for any other folder.

    Raises:
        UserError: its ``run.json`` is damaged.
    """
    if not (folder / RUN).is_file() or (folder / "model").is_dir() or (folder / "lora").is_dir():
        return None
    from fewstep.core import json_io

    stages = sorted(note.parent for note in folder.glob(f"[0-9]*-*/{RUN}"))
    stage = stages[-1] if stages else folder
    where = f" of its stage {stage.name}" if stages else ""
    steps = json_io.read(stage / RUN, _RunFile).options.steps
    names = [path.name for path in (stage / CHECKPOINTS).glob("[0-9]*") if path.name.isdecimal()]
    done = max(map(int, names), default=0)
    at = f"at step {done} of {steps}{where}" if steps else "before its first step"
    return f"{folder} is a run {at} that has not finished: the command that began it goes on with it"
