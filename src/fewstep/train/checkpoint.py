"""Checkpoints: everything that exact resumption needs, whole or not at all.

A checkpoint is a folder of torch's distributed format (DCP), ``checkpoints/STEP``: every process writes what
it holds, and any number of processes reads it. It is written under another name and renamed, with a list of
its files and their sizes; the last two are kept, so that a broken one does not cost the run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep import formats
from fewstep.train import legacy
from fewstep.train.parallel import by_first, world
from fewstep.types import UserError

FOLDER = "checkpoints"
LIST = "whole.json"
"""In a checkpoint: its step, and its files with their sizes."""

KEPT = 2


@dataclass(frozen=True)
class _List:
    """The shape of :data:`LIST`."""

    files: dict[str, int]


@dataclass(frozen=True)
class _Owner:
    """What ``run.json`` says of whose run a folder holds."""

    recipe: str | None = None
    made_of: dict[str, Any] = field(default_factory=dict[str, Any])


def save(folder: Path, held: Mapping[str, Any], step: int) -> None:
    """Write ``folder/checkpoints/STEP``; keep the one before it. All processes call it.

    Args:
        folder: of the run.
        held: ``nets``, ``optimizers`` and ``averages``, each by name.
        step: updates done.

    Raises:
        UserError: the disk is full or refuses; earlier checkpoints are untouched.
    """
    import torch.distributed.checkpoint as dcp

    target = folder / FOLDER / f"{step:08d}"
    part = target.with_name(f".{target.name}.part")
    try:
        by_first(lambda: _make_room(part))
        writer = dcp.FileSystemWriter(part)
        with _alone():
            dcp.save(_flat(held, step), storage_writer=writer, no_dist=world().size == 1)
        by_first(lambda: _settle(part, target, step))
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"{target} could not be written ({_said(error)}); the earlier checkpoint is kept"
        ) from error


def restore(folder: Path, held: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """Load the last whole checkpoint into ``held`` where there is one; tells the step to go on from.

    One that is broken is named on the terminal, and the one before it is taken.

    Raises:
        UserError: the folder belongs to another recipe or to other frozen parts (``about["made_of"]``), or
            no checkpoint in it can be read.
    """
    by_first(lambda: check_owner(folder, about))
    there = by_first(lambda: sorted((folder / FOLDER).glob("[0-9]*"), reverse=True))
    for number, path in enumerate(there):
        why = by_first(lambda path=path: _fault(path)) or _load(path, held)
        if why is None:
            return int(path.name)
        if number + 1 == len(there):
            raise UserError(f"{path} cannot be resumed ({why}); move {path.parent} away to start anew")
        if world().first:
            print(f"fewstep: {path} cannot be resumed ({why}); going on from the one before", file=sys.stderr)
    return legacy.restore(folder, held)


def borrow(folder: Path, nets: Mapping[str, Any]) -> None:
    """Give whole nets the weights that they had at the end of another run, from its last checkpoint.

    Args:
        folder: of that run.
        nets: by the names that they have there.

    Raises:
        UserError: there is no whole checkpoint, or it is of other nets.
    """
    import torch.distributed.checkpoint as dcp

    step = done(folder)
    if not step:
        raise UserError(f"{folder} has no whole checkpoint; train it anew")
    path = folder / FOLDER / f"{step:08d}"
    flat = {
        f"nets/{name}/{key}": value for name, net in nets.items() for key, value in net.state_dict().items()
    }
    try:
        with _alone():
            dcp.load(flat, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # a damaged pickle can raise anything
        names = ", ".join(nets)
        raise UserError(f"{path} does not give its {names} ({_said(error)}); train {folder} anew") from error


def done(folder: Path) -> int:
    """The step of the last whole checkpoint of a run's folder; 0 where there is none."""
    whole = [path for path in (folder / FOLDER).glob("[0-9]*") if _fault(path) is None]
    return max((int(path.name) for path in whole), default=0)


def check_owner(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UserError: it does, or does not tell what it holds.
    """
    note = folder / "run.json"
    if not note.exists():
        return
    try:
        there = formats.read(note, _Owner, python=True)
    except UserError as error:
        raise UserError(f"{error}; move it away, or choose another folder with --out") from None
    if there.recipe != about.get("recipe"):
        raise UserError(f"{folder} holds a run of {there.recipe}; choose another folder with --out")
    mine, theirs = about.get("made_of", {}), there.made_of
    if others := [part for part in theirs if mine.get(part) != theirs[part]]:
        raise UserError(f"{folder} holds a run with another {others[0]}; choose another folder with --out")


def _flat(held: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Everything as ``GROUP/NAME/KEY`` -> tensor: the tensors themselves, so that loading fills them."""
    import torch

    flat: dict[str, Any] = {"step": torch.tensor(step)}
    for name, net in held["nets"].items():
        flat |= {f"nets/{name}/{key}": value for key, value in net.state_dict().items()}
        states = held["optimizers"][name].state
        for key, parameter in net.named_parameters():
            for what, value in states.get(parameter, {}).items():
                flat[f"optimizers/{name}/{key}/{what}"] = value
    for name, average in held["averages"].items():
        flat |= {f"averages/{name}/{key}": value for key, value in average.values.items()}
        flat[f"counts/{name}"] = torch.tensor(average.count)
    return flat


def _load(path: Path, held: Mapping[str, Any]) -> str | None:
    """Fill ``held`` from a checkpoint; tells why it cannot be read.

    Raises:
        UserError: it can be read, but is of other nets.
    """
    import torch.distributed.checkpoint as dcp

    try:
        reader = dcp.FileSystemReader(path)
        shapes = {
            key: getattr(m, "size", None) for key, m in reader.read_metadata().state_dict_metadata.items()
        }
        _expect(held, shapes)
        flat = _flat(held, 0)
        mine = {key: getattr(value, "shape", None) for key, value in flat.items()}
        if mine == shapes:
            with _alone():
                dcp.load(flat, storage_reader=reader, no_dist=world().size == 1)
    except (Exception, dcp.CheckpointException) as error:  # a damaged pickle can raise anything
        return _said(error)
    if mine != shapes:
        odd = sorted(set(mine.items()) ^ set(shapes.items()))[0][0]
        raise UserError(f"{path} is of other nets than this run's ({odd}); choose another folder with --out")
    for name, average in held["averages"].items():
        average.count = int(flat[f"counts/{name}"])
    return None


def _expect(held: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Give each optimizer empty states for just those parameters that have some in the checkpoint."""
    import torch

    of: dict[str, list[str]] = {}
    for key in keys:
        owner, _, what = key.rpartition("/")
        of.setdefault(owner, []).append(what)
    for name, net in held["nets"].items():
        optimizer = held["optimizers"][name]
        optimizer.state.clear()
        for key, parameter in net.named_parameters():
            for what in of.get(f"optimizers/{name}/{key}", ()):
                like = (
                    torch.zeros((), device=parameter.device)
                    if what == "step"
                    else torch.zeros_like(parameter)
                )
                optimizer.state[parameter][what] = like.requires_grad_(False)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, as far as their sizes tell."""
    if not (path / LIST).exists():
        return f"{LIST} is missing"
    try:
        files = formats.read(path / LIST, _List).files
        if any(Path(name).name != name for name in files):
            return f"{LIST} is damaged"
        short = [name for name, size in files.items() if (path / name).stat().st_size != size]
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, UserError, ValueError):
        return f"{LIST} is damaged"
    return f"{short[0]} is cut short" if short else None


def _make_room(part: Path) -> None:
    """An empty folder; what killed processes left beside it goes."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        for left in part.parent.glob(".*.part"):
            shutil.rmtree(left)
        part.mkdir()
    except OSError as error:
        raise UserError(
            f"{part.parent} cannot be written ({error.strerror}); earlier checkpoints are kept"
        ) from error


def _settle(part: Path, target: Path, step: int) -> None:
    """Give a written checkpoint its name, and drop those that are not needed any more."""
    try:
        sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
        with (part / LIST).open("w") as note:
            json.dump({"step": step, "files": sizes}, note)
            note.flush()
            os.fsync(note.fileno())  # else a power cut could leave the new name with no content
        if target.exists():
            shutil.rmtree(target)  # one that could not be read
        part.rename(target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{target} could not be written ({error}); the earlier checkpoint is kept") from error
    before = sorted(path for path in target.parent.glob("[0-9]*") if path.name < target.name)
    after = [path for path in target.parent.glob("[0-9]*") if path.name > target.name]  # could not be read
    for path in before[: -(KEPT - 1)] + after:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _alone() -> Generator[None]:
    """One process is what is meant: DCP warns of it even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _said(error: BaseException) -> str:
    """An error in one short line; of those that DCP gathers from all processes, the first."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    line = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__} {line}".strip()
