"""The best averaged nets of a run so far, by its score: ``best/NAME.safetensors`` and ``best/best.json``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.core import json_io
from fewstep.core.atomic import replacing_folder
from fewstep.core.types import UserError
from fewstep.train.distributed import on_rank_zero, weights
from fewstep.train.run import Run

FOLDER = "best"
NOTE = "best.json"


@dataclass(frozen=True)
class _Note:
    """The shape of ``best.json``."""

    step: int
    metric: str
    value: float


def update_best(run: Run, nets: dict[str, Any], step: int) -> dict[str, float]:
    """Score the averaged nets, and keep them where none before was better. All processes call it.

    Every process computes the score (a sharded net needs all of them to run); the first one's counts.

    Returns:
        metric -> score, for the log.

    Raises:
        UserError: the disk refuses; the best before is kept.
    """
    if run.score is None:
        return {}
    mine = float(run.score(nets))
    score: float = on_rank_zero(lambda: mine)
    before = on_rank_zero(lambda: read(run.folder))
    if math.isfinite(score) and (before is None or _better(run, score, before)):
        kept = nets if run.averaged is None else run.averaged
        held = {name: weights(nets[name]) for name in kept}
        on_rank_zero(lambda: _write(run, held, {"step": step, "metric": run.metric, "value": score}))
    return {run.metric: score}


def read(folder: Path) -> dict[str, Any] | None:
    """``{"step", "metric", "value"}`` of the best nets of a run's folder; ``None`` where there are none."""
    note = folder / FOLDER / NOTE
    if not note.exists():
        return None
    try:
        return asdict(json_io.read(note, _Note, python=True))
    except UserError as error:
        raise UserError(f"{error}; move {note.parent} away") from None


def best(run: Run) -> dict[str, Any]:
    """The run's nets with their best weights, for a ``finish`` that wants those instead of the last.

    It is for nets that are whole, as they are in ``finish``.

    Raises:
        UserError: there are none, or they are broken.
    """
    from safetensors.torch import load_file

    if read(run.folder) is None:
        raise UserError(f"{run.folder / FOLDER} holds no best nets; was the run scored?")
    for name in run.method.nets if run.averaged is None else run.averaged:
        path = run.folder / FOLDER / f"{name}.safetensors"
        try:
            run.method.nets[name].load_state_dict(load_file(path))
        except Exception as error:  # safetensors' own error among them
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:120]})") from error
    return {name: net.eval() for name, net in run.method.nets.items()}


def _better(run: Run, score: float, before: dict[str, Any]) -> bool:
    if before["metric"] != run.metric:
        return True  # measured otherwise since: no comparison
    return score > before["value"] if run.higher else score < before["value"]


def _write(run: Run, held: dict[str, dict[str, Any]], note: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    try:
        with replacing_folder(run.folder / FOLDER) as fresh:
            for name, tensors in held.items():
                # Each on its own: weights that two modules share are no longer shared in a file.
                save_file({key: t.clone() for key, t in tensors.items()}, fresh / f"{name}.safetensors")
            (fresh / NOTE).write_text(json.dumps(note) + "\n")
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(
            f"{run.folder / FOLDER} could not be written ({error}); the best before is kept"
        ) from error
