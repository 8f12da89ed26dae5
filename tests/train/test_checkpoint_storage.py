"""A foreign checkpoint executes nothing; what is broken in it is told from what keeps it from being read."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.helpers.held import held
from tests.helpers.worker import run_of
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)

from fewstep.core.signals import Stop
from fewstep.core.types import UserError
from fewstep.train import checkpoint, checkpoint_errors, checkpoint_storage
from fewstep.train.checkpoint import FOLDER, LIST, load_from_run
from fewstep.train.train_step import State
from fewstep.train.trainer import train


class Bomb:
    """Its pickle makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def listed(path: Path) -> None:
    """Let a checkpoint's list say what its files are now, as a hostile sender would."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != LIST}
    (path / LIST).write_text(json.dumps({"step": int(path.name), "files": sizes}))


def index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    told = json.loads((path / ".metadata").read_text())
    change(told)
    (path / ".metadata").write_text(json.dumps(told))


def weight(path: Path, **changes: Any) -> None:
    def change(told: dict[str, Any]) -> None:
        tensor = told["tensors"]["nets/first/weight"]
        for key, value in changes.items():
            (tensor if key in tensor else tensor["chunks"][0])[key] = value

    index(path, change)


def nested(bomb: Bomb) -> Metadata:
    return Metadata({"step": BytesStorageMetadata()}, {"a": [bomb]}, {}, StorageMeta(modules=[bomb]))


def foreign(path: Path, bomb: Bomb) -> None:
    """A whole checkpoint as torch itself writes it, with an object among the tensors."""
    for file in path.iterdir():
        file.unlink()
    with checkpoint_errors.no_dist_warning():
        dcp.save({"step": torch.tensor(4), "object": bomb}, checkpoint_id=path, no_dist=True)


def of_bytes(path: Path, bomb: Bomb) -> None:
    """An index of an object, which torch's own reader would unpickle."""
    foreign(path, bomb)
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.state_dict_metadata = dict.fromkeys(["step", "nets/first/weight"], BytesStorageMetadata())
    of_object = metadata.storage_data[MetadataIndex("object")]
    metadata.storage_data = {MetadataIndex(key): of_object for key in metadata.state_dict_metadata}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def zipped(path: Path, bomb: Bomb) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(bomb))
    (path / "__0_0.distcp").write_bytes(data.getvalue())


def elsewhere(path: Path, bomb: Bomb) -> None:
    (path.parent / "bomb.distcp").write_bytes(pickle.dumps(bomb) * 999)

    def change(told: dict[str, Any]) -> None:
        for tensor in told["tensors"].values():
            tensor["chunks"][0]["file"] = "../bomb.distcp"

    index(path, change)


def absolute(path: Path, bomb: Bomb) -> None:
    def change(told: dict[str, Any]) -> None:
        for tensor in told["tensors"].values():
            tensor["chunks"][0]["file"] = "/dev/zero"

    index(path, change)


def vast(path: Path, bomb: Bomb) -> None:
    def change(told: dict[str, Any]) -> None:
        for tensor in told["tensors"].values():
            tensor["chunks"][0]["sizes"] = [2**40 for _ in tensor["size"]]

    index(path, change)


def partial(path: Path, bomb: Bomb) -> None:
    """Half a tensor: the rest would be whatever was in memory."""

    def change(told: dict[str, Any]) -> None:
        told["tensors"]["nets/first/weight"]["chunks"][0]["sizes"] = [2, 4]

    index(path, change)


def pipe(path: Path, bomb: Bomb) -> None:
    (path / "__0_0.distcp").unlink()
    os.mkfifo(path / "__0_0.distcp")


HOSTILE: dict[str, Callable[[Path, Bomb], Any]] = {
    "pickled index": lambda path, bomb: (path / ".metadata").write_bytes(pickle.dumps(bomb)),
    "object in the index": lambda path, bomb: (path / ".metadata").write_bytes(pickle.dumps(nested(bomb))),
    "torch's own": foreign,
    "torch's own, an object for a tensor": of_bytes,
    "pickled tensors": lambda path, bomb: (path / "__0_0.distcp").write_bytes(pickle.dumps(bomb)),
    "zipped pickle": zipped,
    "file beside the checkpoint": elsewhere,
    "absolute path": absolute,
    "sizes beyond memory": vast,
    "half a tensor": partial,
    "a pipe": pipe,
    "deep index": lambda path, bomb: (path / ".metadata").write_text("[" * 10**6),
    "unknown type": lambda path, bomb: weight(path, dtype="load"),
    "negative start": lambda path, bomb: weight(path, start=-1),
    "start beyond any file": lambda path, bomb: weight(path, start=2**63 - 1),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_executes_nothing_and_is_passed_over(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary, run = tmp_path / "canary", tmp_path / "run"
    train(run_of(run, 4))
    last = run / FOLDER / "00000004"
    HOSTILE[kind](last, Bomb(canary))
    listed(last)
    capsys.readouterr()
    assert State(run_of(run, 6)).step == 3
    said = capsys.readouterr().err
    assert said.startswith(f"fewstep: {last} cannot be resumed (") and said.count("\n") == 1
    with pytest.raises(UserError) as caught:
        load_from_run(run, run_of(run, 6).method.nets)
    assert "\n" not in str(caught.value)
    assert not canary.exists()
    train(run_of(run, 6))
    train(run_of(tmp_path / "whole", 6))
    one, other = held(run), held(tmp_path / "whole")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["pickled index", "object in the index"])
def test_torchs_own_reader_would_have_executed_it(kind: str, tmp_path: Path) -> None:
    canary, run = tmp_path / "canary", tmp_path / "run"
    train(run_of(run, 4))
    last = run / FOLDER / "00000004"
    HOSTILE[kind](last, Bomb(canary))
    with suppress(AttributeError):
        dcp.FileSystemReader(last).read_metadata()
    assert canary.exists()


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", ""])
def test_a_list_names_files_of_its_checkpoint_alone(name: str, tmp_path: Path) -> None:
    train(run_of(tmp_path, 4))
    last = tmp_path / FOLDER / "00000004"
    told = json.loads((last / LIST).read_text())
    told["files"][name] = 1
    (last / LIST).write_text(json.dumps(told))
    assert State(run_of(tmp_path, 6)).step == 3


@pytest.mark.parametrize("name", ["0abc", "00000009.tmp", "²"])
def test_other_folders_beside_checkpoints_are_none(name: str, tmp_path: Path) -> None:
    train(run_of(tmp_path, 4))
    (tmp_path / FOLDER / name).mkdir()
    assert State(run_of(tmp_path, 6)).step == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EACCES, "Permission denied"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["index", "numbers"])
def test_what_keeps_a_checkpoint_from_being_read_is_not_its_fault(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_of(tmp_path, 4))
    with monkeypatch.context() as patch:
        fail(patch, place, error)
        with pytest.raises(UserError, match=r"cannot be read now .* and is kept") as caught:
            State(run_of(tmp_path, 6))
        assert "00000004" in str(caught.value) and "\n" not in str(caught.value)
    assert State(run_of(tmp_path, 6)).step == 4


@pytest.mark.parametrize("place", ["index", "numbers"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_within_a_restore_is_a_stop(
    number: int,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(run_of(tmp_path, 4))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fail(patch, place, Stop(number))
        with pytest.raises(Stop) as caught:
            State(run_of(tmp_path, 6))
        assert caught.value.number == number
    assert capsys.readouterr().err == ""
    assert State(run_of(tmp_path, 6)).step == 4


def test_a_stop_within_a_save_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run_of(tmp_path, 4))
    state = State(run_of(tmp_path, 6))
    state.train_step()

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(checkpoint_storage.zlib, "crc32", stop)
    with pytest.raises(Stop):
        checkpoint.save(tmp_path, state.all(), state.step)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00000003", "00000004"]


def fail(patch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    """Raise an error where the index, or the numbers of a tensor, would be read."""
    real = checkpoint_storage.read_bytes

    def read(path: Path, most: int, start: int = 0) -> bytearray:
        if path.name == {"index": ".metadata", "numbers": "__0_0.distcp"}[place]:
            raise error
        return real(path, most, start)

    patch.setattr(checkpoint_storage, "read_bytes", read)
