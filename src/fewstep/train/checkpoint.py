"""Checkpoints: everything that exact resumption needs, written atomically.

A checkpoint is a folder, ``checkpoints/STEP`` (:mod:`fewstep.train.checkpoint_storage`). Every process writes
its part, and any number of processes reads it. It is written under another name and renamed, with a list of
its files and their sizes. The last two are kept, so that a broken one does not cost the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fewstep.core import atomic, json_io
from fewstep.core.progress import say
from fewstep.core.types import UserError
from fewstep.train.checkpoint_errors import no_dist_warning, read_errors, write_errors
from fewstep.train.distributed import on_rank_zero, world
from fewstep.train.run_owner import check_owner

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from fewstep.modules.ema import EMA


FOLDER = "checkpoints"
LIST = "whole.json"
"""File of a checkpoint with its step, and its files with their sizes."""

KEPT = 2


@dataclass(frozen=True)
class Contents:
    """The content of :data:`LIST`: the step, and each file's size in bytes."""

    step: int
    files: dict[str, int]


class TrainState(TypedDict):
    """The parts of a run that a checkpoint holds, each by name."""

    nets: Mapping[str, Module]
    optimizers: Mapping[str, Optimizer]
    averages: Mapping[str, EMA]


def save(folder: Path, state: TrainState, step: int) -> None:
    """Write ``folder/checkpoints/STEP`` and keep the one before it. All processes call it.

    Args:
        folder: of the run.
        state: ``nets``, ``optimizers`` and ``averages``, each by name.
        step: training steps done.

    Raises:
        UserError: the disk is full or refuses; earlier checkpoints are untouched.
    """
    import torch.distributed.checkpoint as dcp

    from fewstep.train.checkpoint_storage import Writer

    target = folder / FOLDER / f"{step:08d}"
    with ExitStack() as stack:

        def begin() -> Path:
            return stack.enter_context(atomic.replacing_folder(target))

        def end() -> None:
            _write_list(part, step)
            stack.close()
            _trim(target)

        part: Path = on_rank_zero(lambda: write_errors(target, begin))
        with no_dist_warning():
            write_errors(
                target,
                lambda: dcp.save(_flat(state, step), storage_writer=Writer(part), no_dist=world().size == 1),
            )
        on_rank_zero(lambda: write_errors(target, end))


def restore(folder: Path, state: TrainState, record: Mapping[str, object]) -> int:
    """Load the last intact checkpoint into ``state`` and return its step, or 0 if there is none.

    A broken checkpoint is named on standard error, and the one before it is loaded.

    Raises:
        UserError: the folder belongs to another recipe or to other frozen parts (``record["made_of"]``), all
            its checkpoints are broken, or an intact one cannot be read for lack of memory, open files or
            permission.
    """
    on_rank_zero(lambda: check_owner(folder, record))
    paths: list[Path] = on_rank_zero(lambda: sorted(_all(folder), reverse=True))
    for number, path in enumerate(paths):
        fault = on_rank_zero(lambda path=path: _fault(path)) or _load(path, state)
        if fault is None:
            on_rank_zero(lambda path=path: _trim(path, later=False))
            return int(path.name)
        if number + 1 == len(paths):
            raise UserError(f"{path} cannot be resumed ({fault}); move {path.parent} away to start anew")
        if world().first:
            say(f"{path} cannot be resumed ({fault}); going on from the one before")
    return 0


def load_from_run(folder: Path, nets: Mapping[str, Module]) -> None:
    """Load the weights that nets had at the end of another run, from its last checkpoint.

    Args:
        folder: of that run.
        nets: unsharded, by their names in that run.

    Raises:
        UserError: there is no intact checkpoint, or it is of other nets.
    """
    import torch.distributed.checkpoint as dcp

    from fewstep.train.checkpoint_storage import Damaged, Reader

    step = last_step(folder)
    if not step:
        raise UserError(f"{folder} has no whole checkpoint; train it anew")
    path = folder / FOLDER / f"{step:08d}"
    flat = {
        f"nets/{name}/{key}": value for name, net in nets.items() for key, value in net.state_dict().items()
    }
    names = ", ".join(nets)
    try:
        with read_errors(path), no_dist_warning():
            reader = Reader(path)
            sizes = {key: tensor.size for key, tensor in reader.index.tensors.items()}
            for key, value in flat.items():
                if sizes.get(key) != tuple(value.shape):
                    raise Damaged(f"it is of other nets, see {key}")
            dcp.load(flat, storage_reader=reader, no_dist=True)
    except Damaged as error:
        raise UserError(f"{path} does not give its {names} ({error}); train {folder} anew") from error


def last_step(folder: Path) -> int:
    """Return the step of the last intact checkpoint of a run's folder, or 0 if there is none."""
    return max((int(path.name) for path in _all(folder) if _fault(path) is None), default=0)


def _flat(state: TrainState, step: int) -> dict[str, Tensor]:
    """Return all tensors by ``GROUP/NAME/KEY``. They are not copied, so that loading fills them."""
    import torch

    flat: dict[str, Tensor] = {"step": torch.tensor(step)}
    for name, net in state["nets"].items():
        flat |= {f"nets/{name}/{key}": value for key, value in net.state_dict().items()}
        moments = state["optimizers"][name].state
        for key, parameter in net.named_parameters():
            for kind, value in moments.get(parameter, {}).items():
                flat[f"optimizers/{name}/{key}/{kind}"] = value
    for name, average in state["averages"].items():
        flat |= {f"averages/{name}/{key}": value for key, value in average.values.items()}
        flat[f"counts/{name}"] = torch.tensor(average.count)
    return flat


def _load(path: Path, state: TrainState) -> str | None:
    """Load a checkpoint into ``state``; return what is broken in it, or ``None``.

    Raises:
        UserError: it is intact, but of other nets, or cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    from fewstep.train.checkpoint_storage import Damaged, Reader

    try:
        with read_errors(path), no_dist_warning():
            reader = Reader(path)
            shapes = {key: tensor.size for key, tensor in reader.index.tensors.items()}
            _make_optimizer_state(state, shapes)
            flat = _flat(state, 0)
            own = {key: tuple(value.shape) for key, value in flat.items()}
            if own == shapes:
                dcp.load(flat, storage_reader=reader, no_dist=world().size == 1)
    except Damaged as error:
        return str(error)
    if own != shapes:
        different = sorted(set(own.items()) ^ set(shapes.items()))[0][0]
        raise UserError(
            f"{path} is of other nets than this run's ({different}); choose another folder with --output"
        )
    for name, average in state["averages"].items():
        average.count = int(flat[f"counts/{name}"])
    return None


def _make_optimizer_state(state: TrainState, keys: Iterable[str]) -> None:
    """Give each optimizer an empty state for those parameters that have one in the checkpoint."""
    import torch

    kinds: dict[str, list[str]] = {}
    for key in keys:
        owner, _, kind = key.rpartition("/")
        kinds.setdefault(owner, []).append(kind)
    for name, net in state["nets"].items():
        optimizer = state["optimizers"][name]
        optimizer.state.clear()
        for key, parameter in net.named_parameters():
            for kind in kinds.get(f"optimizers/{name}/{key}", ()):
                like = (
                    torch.zeros((), device=parameter.device)
                    if kind == "step"
                    else torch.zeros_like(parameter)
                )
                optimizer.state[parameter][kind] = like.requires_grad_(False)


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's folder, broken ones too."""
    return [path for path in (folder / FOLDER).glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, judged by their sizes, or ``None``.

    Raises:
        UserError: they cannot be read.
    """
    from fewstep.train.checkpoint_storage import Damaged, read_bytes

    try:
        with read_errors(path):
            contents: Contents = json_io.parse(
                bytes(read_bytes(path / LIST, json_io.MOST_BYTES)), Contents, LIST
            )
            for name, size in contents.files.items():
                if Path(name).name != name:
                    return f"{LIST} is damaged"
                if not (path / name).exists():
                    return f"{name} is missing"
                if (path / name).stat().st_size != size:
                    return f"{name} is cut short"
    except Damaged as error:
        return str(error)
    return None


def _write_list(part: Path, step: int) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
    with (part / LIST).open("w") as note:
        json.dump({"step": step, "files": sizes}, note)
        note.flush()
        os.fsync(note.fileno())  # else a power cut could leave an empty file under the new name


def _trim(last: Path, later: bool = True) -> None:
    """Remove the checkpoints that ``last`` replaces, and ``later`` ones, which could not be read."""
    paths = sorted(_all(last.parents[1]))
    before = [path for path in paths if path.name < last.name]
    after = [path for path in paths if path.name > last.name and later]
    for path in before[: -(KEPT - 1)] + after:
        atomic.remove(path)
