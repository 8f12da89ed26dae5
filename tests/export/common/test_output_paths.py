"""An export goes where a link points; the link stays."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("openvino")

from fewstep.cli.app import run
from fewstep.core.types import UserError
from fewstep.export.common.output_paths import fresh_file
from fewstep.runtime.bundle import read
from tiny_bundle import write_bundle


def exported(tmp_path: Path, out: str) -> int:
    bundle = write_bundle(tmp_path / "bundle").folder
    words = ["export", str(bundle), "--to", "openvino", "--bits", "16", "-o", str(tmp_path / out)]
    return run(words)


@pytest.mark.parametrize("links", [{"out": "disk/a"}, {"out": "second", "second": "disk/a"}])
@pytest.mark.parametrize("there", [True, False], ids=["an earlier export", "nothing there"])
def test_a_linked_folder_is_exported_into(tmp_path: Path, links: dict[str, str], there: bool) -> None:
    if there:
        assert exported(tmp_path, "disk/a") == 0
        (tmp_path / "disk/a/old").touch()
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert exported(tmp_path, "out") == 0
    assert all((tmp_path / link).is_symlink() for link in links)
    assert read(tmp_path / "disk/a").engine == "openvino" and not (tmp_path / "disk/a/old").exists()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["bundle", "disk", *links])


def test_a_link_to_something_else_or_to_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/notes").touch()
    for link, target in {"out": "precious", "loop": "loop", "itself": "bundle"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
        assert exported(tmp_path, link) == 2
        error = capsys.readouterr().err
        assert error.startswith("fewstep: ") and error.count("\n") == 1
        assert (tmp_path / link).is_symlink()
    assert (tmp_path / "precious/notes").exists() and read(tmp_path / "bundle").engine == "onnx"


def test_a_linked_file_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to("disk/new/b.gguf")
    for text in ("one", "two"):
        with fresh_file(tmp_path / "a.gguf", ".gguf", lambda path: True) as fresh:
            fresh.write_text(text)
        assert (tmp_path / "disk/new/b.gguf").read_text() == text
    (tmp_path / "strange.gguf").symlink_to("disk/new/b.gguf")
    with (
        pytest.raises(UserError, match="no export of fewstep"),
        fresh_file(tmp_path / "strange.gguf", ".gguf", lambda path: False),
    ):
        pass
    assert (tmp_path / "a.gguf").is_symlink() and len(list((tmp_path / "disk/new").iterdir())) == 1
