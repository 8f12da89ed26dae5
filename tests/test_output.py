from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.output import names, slug
from fewstep.picture import Record
from fewstep.types import UserError

RECORD = Record("A Red/Apple, 3D style!", 7, 4, "org/name", "", (8, 8))


@pytest.mark.parametrize(
    ("output", "pictures", "expected"),
    [
        (None, 1, "a-red-apple-3d-style-7.png"),
        ("out/", 1, "out/a-red-apple-3d-style-7.png"),
        ("out", 9, "out/a-red-apple-3d-style-7.png"),
        ("x.png", 1, "x.png"),
        ("x.PNG", 2, "x-3.PNG"),
        ("{seed}/{index:03d}-{prompt}-{model}-{steps}.png", 2, "7/003-a-red-apple-3d-style-org-name-4.png"),
    ],
)
def test_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None, pictures: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = names(output, pictures)(3, RECORD)
    assert path == Path(expected)
    assert path.parent.is_dir()


def test_taken_names_are_numbered_but_for_the_exact_file(tmp_path: Path) -> None:
    free = names(str(tmp_path / "{prompt}.png"), 1)
    for expected in ("", "-2", "-3"):
        path = free(1, RECORD)
        assert path.name == f"a-red-apple-3d-style{expected}.png"
        path.touch()
    exact = names(str(tmp_path / "x.png"), 1)
    (tmp_path / "x.png").touch()
    assert exact(1, RECORD).name == "x.png"


@pytest.mark.parametrize("output", ["x.jpg", "{x}.png", "{}.png", "{seed.png", "{seed:!}.png", "{seed}.gif"])
def test_bad_outputs(output: str) -> None:
    with pytest.raises(UserError):
        names(output, 1)


def test_slugs_are_safe_names() -> None:
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("!!!") == "picture"
    assert len(slug("word " * 1000)) <= 60
