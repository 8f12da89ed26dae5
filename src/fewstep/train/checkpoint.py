"""Checkpoints: everything that exact resumption needs, whole or not at all.

A checkpoint is a folder, ``checkpoints/STEP`` (:mod:`fewstep.train.checkpoint_storage`): every process
writes what it
holds, and any number of processes reads it. It is written under another name and renamed, with a list of its
files and their sizes; the last two are kept, so that a broken one does not cost the run.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core import atomic, json_io
from fewstep.core.types import UserError
from fewstep.train.distributed import on_rank_zero, world

T = TypeVar("T")
FOLDER = "checkpoints"
LIST = "whole.json"
"""In a checkpoint: its step, and its files with their sizes."""

KEPT = 2

RENAMED: dict[str | None, str] = {
    "distill-adversarial": "distill-ladd",
    "distill-consistency": "distill-lcm",
    "pocket-codec": "pocket-vae",
    "pocket-words": "pocket-paraphrases",
}
"""Recipes by the names that run folders may still hold."""


@dataclass(frozen=True)
class _Owner:
    """What ``run.json`` says of whose run a folder holds."""

    recipe: str | None = None
    made_of: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Contents:
    """Of :data:`LIST`: the step, and each file's size in bytes."""

    step: int
    files: dict[str, int]


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

    from fewstep.train.checkpoint_storage import Writer

    target = folder / FOLDER / f"{step:08d}"
    with ExitStack() as stack:

        def begin() -> Path:
            return stack.enter_context(atomic.replacing_folder(target))

        def end() -> None:
            _write_list(part, step)
            stack.close()
            _trim(target)

        part: Path = on_rank_zero(lambda: _writing(target, begin))
        with _alone():
            _writing(
                target,
                lambda: dcp.save(_flat(held, step), storage_writer=Writer(part), no_dist=world().size == 1),
            )
        on_rank_zero(lambda: _writing(target, end))


def restore(folder: Path, held: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """Load the last whole checkpoint into ``held`` where there is one; tells the step to go on from.

    One that is broken is named on the terminal, and the one before it is taken.

    Raises:
        UserError: the folder belongs to another recipe or to other frozen parts (``about["made_of"]``), no
            checkpoint in it is whole, or a whole one cannot be read for want of memory, files or permission.
    """
    on_rank_zero(lambda: check_owner(folder, about))
    there: list[Path] = on_rank_zero(lambda: sorted(_all(folder), reverse=True))
    for number, path in enumerate(there):
        why = on_rank_zero(lambda path=path: _fault(path)) or _load(path, held)
        if why is None:
            on_rank_zero(lambda path=path: _trim(path, later=False))
            return int(path.name)
        if number + 1 == len(there):
            raise UserError(f"{path} cannot be resumed ({why}); move {path.parent} away to start anew")
        if world().first:
            print(f"fewstep: {path} cannot be resumed ({why}); going on from the one before", file=sys.stderr)
    return 0


def load_from_run(folder: Path, nets: Mapping[str, Any]) -> None:
    """Give whole nets the weights that they had at the end of another run, from its last checkpoint.

    Args:
        folder: of that run.
        nets: by the names that they have there.

    Raises:
        UserError: there is no whole checkpoint, or it is of other nets.
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
        with _reading(path), _alone():
            reader = Reader(path)
            there = {key: of.size for key, of in reader.index.tensors.items()}
            for key, value in flat.items():
                if there.get(key) != tuple(value.shape):
                    raise Damaged(f"it is of other nets, see {key}")
            dcp.load(flat, storage_reader=reader, no_dist=True)
    except Damaged as error:
        raise UserError(f"{path} does not give its {names} ({error}); train {folder} anew") from error


def last_step(folder: Path) -> int:
    """The step of the last whole checkpoint of a run's folder; 0 where there is none."""
    return max((int(path.name) for path in _all(folder) if _fault(path) is None), default=0)


def check_owner(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Raises:
        UserError: it does, or does not tell what it holds.
    """
    note = folder / "run.json"
    if not note.exists():
        return
    try:
        there = json_io.read(note, _Owner, python=True)
    except UserError as error:
        raise UserError(f"{error}; move it away, or choose another folder with --output") from None
    if RENAMED.get(there.recipe, there.recipe) != about.get("recipe"):
        raise UserError(f"{folder} holds a run of {there.recipe}; choose another folder with --output")
    mine, theirs = about.get("made_of", {}), there.made_of
    if others := [part for part in theirs if mine.get(part) != theirs[part]]:
        raise UserError(f"{folder} holds a run with another {others[0]}; choose another folder with --output")


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
    """Fill ``held`` from a checkpoint; tells what is broken in it.

    Raises:
        UserError: nothing is, but it is of other nets, or cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    from fewstep.train.checkpoint_storage import Damaged, Reader

    try:
        with _reading(path), _alone():
            reader = Reader(path)
            shapes = {key: of.size for key, of in reader.index.tensors.items()}
            _expect(held, shapes)
            flat = _flat(held, 0)
            mine = {key: tuple(value.shape) for key, value in flat.items()}
            if mine == shapes:
                dcp.load(flat, storage_reader=reader, no_dist=world().size == 1)
    except Damaged as error:
        return str(error)
    if mine != shapes:
        odd = sorted(set(mine.items()) ^ set(shapes.items()))[0][0]
        raise UserError(
            f"{path} is of other nets than this run's ({odd}); choose another folder with --output"
        )
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


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, broken ones too."""
    return [path for path in (folder / FOLDER).glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, as far as their sizes tell.

    Raises:
        UserError: they cannot be looked at.
    """
    from fewstep.train.checkpoint_storage import Damaged, read_bytes

    try:
        with _reading(path):
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
        os.fsync(note.fileno())  # else a power cut could leave the new name with no content


def _trim(last: Path, later: bool = True) -> None:
    """Remove checkpoints that ``last`` makes needless; also ``later`` ones, which could not be read."""
    there = sorted(_all(last.parents[1]))
    before = [path for path in there if path.name < last.name]
    after = [path for path in there if path.name > last.name and later]
    for path in before[: -(KEPT - 1)] + after:
        atomic.remove(path)


@contextmanager
def _alone() -> Generator[None]:
    """One process is what is meant: DCP warns of it even when told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _writing(target: Path, action: Callable[[], T]) -> T:
    """What an action returns that writes a checkpoint.

    Raises:
        UserError: the disk is full or refuses.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        return action()
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        if not isinstance(cause, OSError | RuntimeError):
            raise cause from error
        raise UserError(
            f"{target} could not be written ({_said(cause)}); the earlier checkpoint is kept"
        ) from error


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Tell what is broken in a checkpoint from what keeps it from being read.

    Raises:
        Damaged: the checkpoint is broken.
        UserError: it cannot be read for another reason, such as too little memory or too many open files.
    """
    import torch
    from torch.distributed.checkpoint import CheckpointException

    from fewstep.train.checkpoint_storage import Damaged

    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, UserError):  # of the reader of JSON
            raise Damaged(str(cause)) from error
        if isinstance(cause, Damaged | torch.OutOfMemoryError) or not isinstance(cause, Exception):
            raise cause from error
        raise UserError(
            f"{path} cannot be read now ({_said(cause)}), and is kept: run the same again, or move it away "
            "to go on from the one before"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The error itself; of those that DCP gathers from all processes, a stop, else the first."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    stops = [failure for failure in failures if not isinstance(failure, Exception)]
    return next(iter(stops + failures), error)


def _said(error: BaseException) -> str:
    """An error in one short line."""
    line = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__} {line}".strip()
