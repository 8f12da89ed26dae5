"""The EMA nets with the best score of a run: ``best/NAME.safetensors`` and ``best/best.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import json_io
from fewstep.core.atomic import replacing_folder
from fewstep.core.types import UserError
from fewstep.train.distributed import on_rank_zero, weights
from fewstep.train.run import Run

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


FOLDER = "best"
NOTE = "best.json"


@dataclass(frozen=True)
class _Note:
    """The content of ``best.json``."""

    step: int
    metric: str
    value: float


def update_best(run: Run, nets: dict[str, Module], step: int) -> dict[str, float]:
    """Score the EMA nets, and keep them if none before was better. All processes call it.

    Every process computes the score, because a sharded net needs all of them to run. The first one's counts.

    Returns:
        the score by the name of its metric, for the log.

    Raises:
        UserError: the disk is full or refuses; the best nets before are kept.
    """
    if run.score is None:
        return {}
    own = float(run.score(nets))
    score: float = on_rank_zero(lambda: own)
    before = on_rank_zero(lambda: read(run.folder))
    if math.isfinite(score) and (before is None or _better(run, score, before)):
        names = nets if run.averaged is None else run.averaged
        state = {name: weights(nets[name]) for name in names}
        on_rank_zero(lambda: _write(run, state, {"step": step, "metric": run.metric, "value": score}))
    return {run.metric: score}


def read(folder: Path) -> dict[str, Any] | None:
    """Return ``{"step", "metric", "value"}`` of the best nets of a run's folder, or ``None``."""
    note = folder / FOLDER / NOTE
    if not note.exists():
        return None
    try:
        return asdict(json_io.read(note, _Note, python=True))
    except UserError as error:
        raise UserError(f"{error}; move {note.parent} away") from None


def best(run: Run) -> dict[str, Module]:
    """Load the best weights into the run's nets, for a ``finish`` that writes those instead of the last.

    The nets must be unsharded, as they are in ``finish``.

    Raises:
        UserError: there are no best nets, or they are broken.
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
        return True  # another metric: no comparison
    return score > before["value"] if run.higher else score < before["value"]


def _write(run: Run, state: Mapping[str, Mapping[str, Tensor]], note: Mapping[str, object]) -> None:
    from safetensors.torch import save_file

    try:
        with replacing_folder(run.folder / FOLDER) as fresh:
            for name, tensors in state.items():
                # Cloned, because safetensors refuses weights that two modules share.
                save_file({key: t.clone() for key, t in tensors.items()}, fresh / f"{name}.safetensors")
            (fresh / NOTE).write_text(json.dumps(note) + "\n")
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(
            f"{run.folder / FOLDER} could not be written ({error}); the best nets before are kept"
        ) from error
