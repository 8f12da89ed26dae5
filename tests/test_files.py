"""What is written is whole, or what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import files
from fewstep.types import UserError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.npz"
    with files.replacing_file(target) as fresh:
        assert fresh.suffix == ".npz" and fresh.parent == tmp_path
        fresh.write_text("one")
    with pytest.raises(KeyboardInterrupt), files.replacing_file(target) as fresh:
        fresh.write_text("tw")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"] and target.read_text() == "one"


def test_a_folder_comes_back_if_its_successor_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with files.replacing_folder(target) as fresh:
        (fresh / "weights").write_text("old")
    rename = Path.rename

    def stop(self: Path, to: Path) -> Path:
        if to == target and self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt), files.replacing_folder(target) as fresh:
        (fresh / "weights").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "old"


def test_what_a_killed_process_left_does_not_enter(tmp_path: Path) -> None:
    with files.replacing_folder(tmp_path / "model") as fresh:
        left = fresh.name
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").touch()
    with files.replacing_folder(tmp_path / "model") as fresh:
        assert not list(fresh.iterdir())


def test_a_name_of_many_bytes_can_be_written(tmp_path: Path) -> None:
    files.write(tmp_path / f"{'字' * 80}.png", b"x")
    with pytest.raises(UserError, match="cannot write"):
        files.write(tmp_path / f"{'字' * 90}.png", b"x")
