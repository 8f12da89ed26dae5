"""Folders are listed one way: links followed once, hidden things skipped, nothing without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fewstep.core.types import UserError
from fewstep.data.folders import list_files


def files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def listed(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_files(folder).files]


def test_linked_folders_and_files_are_taken_along(tmp_path: Path) -> None:
    files(tmp_path, "in/a", "in/z/b", "out/c", "out/deep/d", "other/e")
    (tmp_path / "in/linked").symlink_to("../out")
    (tmp_path / "in/z/f").symlink_to(tmp_path / "other/e")
    (tmp_path / "out/deep/on").symlink_to(tmp_path / "other", target_is_directory=True)
    assert listed(tmp_path / "in") == ["a", "linked/c", "linked/deep/d", "linked/deep/on/e", "z/b", "z/f"]


@pytest.mark.parametrize("target", [".", "..", "sub", "../in", "../in/sub", "loop"])
def test_links_in_a_circle_come_to_an_end(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path, "in/a", "in/sub/b", "beside/c")
    (tmp_path / "in/loop").symlink_to(target)
    found = list_files(tmp_path / "in")
    names = [path.name for path in found.files]
    assert names == (["a", "loop", "b"] if target == "loop" else ["a", "b"])
    found.say_skipped(tmp_path / "in")
    said = capsys.readouterr().err
    assert ("skipped 1 link to a folder that is listed" in said) == (target != "loop")


def test_two_folders_that_link_to_each_other_are_taken_once(tmp_path: Path) -> None:
    files(tmp_path, "in/one/a", "in/two/b")
    (tmp_path / "in/one/two").symlink_to("../two")
    (tmp_path / "in/two/one").symlink_to("../one")
    assert listed(tmp_path / "in") == ["one/a", "two/b"]


def test_a_folder_by_two_links_or_by_a_link_to_what_holds_it_is_taken_once(tmp_path: Path) -> None:
    files(tmp_path, "in/a", "out/b", "out/deep/c")
    for name, target in (("1", "../out/deep"), ("2", "../out"), ("3", "../out")):
        (tmp_path / "in" / name).symlink_to(target)
    assert listed(tmp_path / "in") == ["1/c", "2/b", "a"]


def test_hidden_files_and_folders_are_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files(tmp_path, ".in/a", ".in/._a", ".in/.ipynb_checkpoints/a", ".in/b/.DS_Store", ".in/b/c")
    assert listed(tmp_path / ".in") == ["a", "b/c"]  # its own dot is no matter
    found = list_files(tmp_path / ".in")
    found.say_skipped(tmp_path / ".in")
    assert "skipped 3 hidden files or folders in" in capsys.readouterr().err
    assert len(found.hidden) == 3


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "in/a", "in/closed/b")
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot list the folder .*closed: Permission denied"):
        list_files(tmp_path / "in")
    with pytest.raises(UserError, match=r"cannot list the folder .*none"):
        list_files(tmp_path / "none")


def test_what_a_model_weighs_and_is_counts_linked_folders(tmp_path: Path) -> None:
    from fewstep.evaluate.candidates import _weights

    files(tmp_path, "model/model_index.json", "parts/vae/weights")
    (tmp_path / "model/vae").symlink_to(tmp_path / "parts/vae")
    (tmp_path / "model/gone").symlink_to("nowhere")
    before = _weights(str(tmp_path / "model"))
    files(tmp_path, "model/.cache/x")
    assert _weights(str(tmp_path / "model")) == before
    (tmp_path / "parts/vae/weights").write_text("others")
    assert _weights(str(tmp_path / "model")) != before
