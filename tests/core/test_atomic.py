"""What is written is whole, or what was there before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fewstep.core import atomic
from fewstep.core.types import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.npz"
    with atomic.replacing_file(target) as fresh:
        assert fresh.name == target.name and fresh.parent.parent == tmp_path
        fresh.write_text("one")
    with pytest.raises(KeyboardInterrupt), atomic.replacing_file(target) as fresh:
        fresh.write_text("tw")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.npz"] and target.read_text() == "one"


@pytest.mark.parametrize("able", [True, False], ids=["exchanged", "renamed twice"])
def test_a_folder_is_replaced_whole_or_not_at_all(
    able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not able:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    for text in ("one", "two"):
        with atomic.replacing_folder(target) as fresh:
            (fresh / text).touch()
        assert names(tmp_path) == ["model"] and names(target) == [text]
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(target) as fresh:
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"] and names(target) == ["two"]


def test_a_folder_comes_back_if_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    with atomic.replacing_folder(target) as fresh:
        (fresh / "weights").write_text("old")
    rename = Path.rename

    def stop(self: Path, to: Path) -> Path:
        if to == target and atomic._OLD not in self.parts:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), atomic.replacing_folder(target) as fresh:
        (fresh / "weights").write_text("new")
    assert names(tmp_path) == ["model"]
    assert (target / "weights").read_text() == "old"


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic.replacing_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"] and (tmp_path / "model").read_text() == "a file"


KILLED = """
import os, signal, sys
from pathlib import Path
from fewstep.core import atomic as files
if sys.argv[1] == "renamed":
    files._exchange = lambda one, other: False
    rename = Path.rename
    def kill(self, to):
        rename(self, to)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = kill
with getattr(files, sys.argv[2])(Path(sys.argv[3])) as fresh:
    if fresh.is_dir():
        (fresh / "new").touch()
    else:
        fresh.write_text("new")
    if sys.argv[1] == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(where: str, way: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, where, way, str(target)])
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("way", ["replacing_file", "replacing_folder"])
def test_what_a_killed_process_left_goes_with_the_next_one(way: str, tmp_path: Path) -> None:
    killed("inside", way, tmp_path / "a")
    assert names(tmp_path)[0].endswith(".part")
    with getattr(atomic, way)(tmp_path / "a") as fresh:
        assert len(names(tmp_path)) == 1
        if way == "replacing_file":
            fresh.touch()
    assert names(tmp_path) == ["a"]


def test_a_folder_that_a_killed_process_put_aside_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    killed("renamed", "replacing_folder", tmp_path / "model")
    assert "model" not in names(tmp_path)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with atomic.replacing_file(tmp_path / "a") as one:
        one.write_text("one")
        with atomic.replacing_file(tmp_path / "a") as other:
            other.write_text("other")
        atomic.sweep(tmp_path)
        assert (tmp_path / "a").read_text() == "other"
    assert (tmp_path / "a").read_text() == "one" and names(tmp_path) == ["a"]


def test_only_leftovers_of_the_name_go(tmp_path: Path) -> None:
    killed("inside", "replacing_file", tmp_path / "a[1]")
    killed("inside", "replacing_file", tmp_path / "b")
    atomic.sweep(tmp_path, "a[1]")
    assert [name.split(".")[1] for name in names(tmp_path)] == ["b"]
    atomic.sweep(tmp_path / "nowhere")


HOLDING = """
import sys, time
from pathlib import Path
from fewstep.core import atomic as files
with files.held(Path(sys.argv[1]), "trained"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDING, folder], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match="being trained by another process"),
            atomic.held(folder, "trained"),
        ):
            pass
        other.kill()
    for _ in range(2):
        with atomic.held(folder, "trained"):
            pass


def test_a_folder_that_is_held_is_swept_and_nothing_of_the_hold_stays(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with pytest.raises(KeyboardInterrupt), atomic.held(folder, "trained"):
        raise KeyboardInterrupt
    assert not (tmp_path / "deep").exists()
    (folder / "checkpoints").mkdir(parents=True)
    killed("inside", "replacing_folder", folder / "checkpoints" / "a")
    killed("inside", "replacing_file", folder / "b")
    with atomic.replacing_file(folder / "checkpoints" / "c") as living, atomic.held(folder, "trained"):
        assert names(folder) == [atomic.LOCK, "checkpoints"]
        assert names(folder / "checkpoints") == [living.parent.name]
        living.touch()
    assert names(folder) == ["checkpoints"] and names(folder / "checkpoints") == ["c"]


def test_what_others_call_a_part_stays(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for name in (".film.mp4.part", "a.0123abcd.part", ".part", ".a.part.tar"):
        (tmp_path / "home" / name).touch()
    with atomic.held(tmp_path, "filled"):
        pass
    assert len(names(tmp_path / "home")) == 4


def test_those_who_share_a_folder_hold_their_parts(tmp_path: Path) -> None:
    with atomic.held(tmp_path, "filled", ".rank-0.lock"), atomic.held(tmp_path, "filled", ".rank-1.lock"):
        with pytest.raises(UserError, match="being filled"), atomic.held(tmp_path, "filled", ".rank-0.lock"):
            pass
    assert names(tmp_path) == []


def test_a_folder_is_removed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "00000003"
    folder.mkdir()
    (folder / "a").touch()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_remove", lambda folder: None)  # as if it were killed there
        atomic.remove(folder)
    assert not folder.exists() and names(tmp_path)[0].endswith(".part")
    atomic.remove(folder)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    atomic.write(tmp_path / "a", b"one")
    atomic.write(tmp_path / "a", b"two")
    with atomic.replacing_file(tmp_path / "b") as fresh:
        fresh.write_bytes(b"three")
    for _ in range(2):
        with atomic.replacing_folder(tmp_path / "c") as fresh:
            (fresh / "d").touch()
    assert all((tmp_path / name).is_symlink() for name in ("a", "b", "c"))
    assert names(tmp_path / "disk") == ["a", "b", "c"] and names(tmp_path) == ["a", "b", "c", "disk"]
    assert (tmp_path / "disk" / "a").read_bytes() == b"two"


def test_a_link_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(UserError, match="cannot write"):
        atomic.write(tmp_path / "a", b"")


def test_what_nothing_can_replace_is_written_through(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic.write(tmp_path / "pipe", b"x")
    assert os.read(reader, 9) == b"x"
    os.close(reader)


MANY = """
import sys
from itertools import count
from pathlib import Path
from fewstep.core import atomic as files
if sys.argv[2] == "named":
    files._unnamed = lambda folder: None
for _ in range(20):
    made = files.write_new((Path(sys.argv[1]) / f"a-{n}.png" for n in count()), b"x" * 9999)
    print(made, flush=True)
"""


@pytest.mark.parametrize("way", ["unnamed", "named"])
def test_a_free_name_is_one_writer_s_alone(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY, str(tmp_path), way]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [line for writer in writers for line in writer.communicate()[0].splitlines()]
    assert len(told) == len(set(told)) == len(names(tmp_path)) == 80
    assert all(path.stat().st_size == 9999 for path in tmp_path.iterdir())


def test_a_name_is_taken_by_a_dangling_link_too(tmp_path: Path) -> None:
    (tmp_path / "0").symlink_to("nowhere")

    def tried() -> Iterator[Path]:
        return (tmp_path / str(number) for number in count())

    assert atomic.write_new(tried(), b"x").name == "1"


def test_where_nothing_can_be_linked_names_are_claimed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic, "_unnamed", lambda folder: None)
    monkeypatch.setattr(os, "link", refuse)
    made = [atomic.write_new((tmp_path / str(number) for number in count()), b"x") for _ in range(3)]
    assert [path.name for path in made] == names(tmp_path) == ["0", "1", "2"]


def test_writers_of_one_file_at_once_leave_one_whole(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom fewstep.core import atomic as files\n"
        "for _ in range(200): files.write(Path(sys.argv[1]), sys.argv[2].encode() * 9999)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a"), letter]) for letter in "xyz"
    ]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "a").exists():
            seen = (tmp_path / "a").read_bytes()
            assert len(seen) == 9999 and len(set(seen)) == 1
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0, 0] and names(tmp_path) == ["a"]


def test_a_name_of_many_bytes_can_be_written(tmp_path: Path) -> None:
    atomic.write(tmp_path / f"{'字' * 80}.png", b"x")
    with atomic.replacing_file(tmp_path / f"{'字' * 80}.png") as fresh:
        fresh.write_bytes(b"y")
    with pytest.raises(UserError, match="cannot write"):
        atomic.write(tmp_path / f"{'字' * 90}.png", b"x")


@pytest.mark.parametrize("replacing", [atomic.replacing_file, atomic.replacing_folder])
@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_said_of_the_target(tmp_path: Path, replacing: Any, named: bool) -> None:
    target = tmp_path / "target"
    with pytest.raises(OSError) as caught, replacing(target) as fresh:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(fresh)] if named else []))
    assert caught.value.filename == str(target) and not target.exists()


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755, 0o400])
@pytest.mark.parametrize("unnamed", [True, False])
def test_what_takes_a_files_place_keeps_its_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(atomic, "_unnamed", lambda folder: None)
    target, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(target)
    target.touch()
    target.chmod(mode)
    atomic.write(link, b"x")
    assert permissions(target) == mode and target.read_bytes() == b"x"
    with atomic.replacing_file(target) as fresh:
        fresh.write_bytes(b"y")
        assert permissions(fresh.parent) == 0o700
    assert permissions(target) == mode and target.read_bytes() == b"y"


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
@pytest.mark.parametrize("exchange", [True, False])
def test_what_takes_a_folders_place_keeps_its_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(mode)
    with atomic.replacing_folder(tmp_path / "a") as fresh:
        (fresh / "new").touch()
    assert permissions(tmp_path / "a") == mode and names(tmp_path / "a") == ["new"]


def test_what_is_new_has_the_permissions_of_all_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    atomic.write(tmp_path / "a", b"x")
    with atomic.replacing_file(tmp_path / "b") as fresh:
        fresh.touch()
    with atomic.replacing_folder(tmp_path / "c"):
        pass
    assert {permissions(tmp_path / name) for name in ("a", "b")} == {permissions(tmp_path / "plain")}
    assert permissions(tmp_path / "c") == permissions(tmp_path / "folder")
