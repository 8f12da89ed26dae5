"""The house's floors: imports only go down, and the base install carries no torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
FLOORS = {
    0: ("types", "flow"),
    1: ("times", "sample", "guide", "losses", "files", "formats", "progress", "signals", "workers", "extras"),
    2: ("runtime", "nets", "text", "families", "data", "picture", "request", "metadata"),
    3: ("methods", "deploy", "staged", "pipeline", "source"),
    4: ("train", "evaluate", "bench", "serve", "study", "output"),
    5: ("recipes", "cli", "cli_errors", "generate", "show", "__main__", "__init__"),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
COMMAND = "command"
"""A room's ``command.py`` is its piece of the command line: floor 5, wherever it lies."""

ENGINE_COMMON = {"__init__", COMMAND, "common"}
"""Modules of ``deploy/`` that are no engine."""

NAMES = frozenset({"__version__"})
"""What any floor may take from the package itself."""


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def targets(path: Path, root: Path) -> Iterator[str]:
    """Modules of fewstep that a file imports, anywhere in it, without the leading ``fewstep.``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fewstep" and rest not in NAMES:
                yield _existing(rest, root)


def _existing(dotted: str, root: Path) -> str:
    """The longest part of a dotted name that is a module: ``flow.mix`` is in ``flow``."""
    parts = dotted.split(".") if dotted else []
    while parts:
        place = root.joinpath(*parts)
        if place.is_dir() or place.with_suffix(".py").is_file():
            return ".".join(parts)
        parts.pop()
    return "__init__"


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    if module.split(".")[-1] == COMMAND:
        return 5
    assert room(module) in FLOOR, f"{module} has no floor: give it one here and in docs/architecture.md"
    return FLOOR[room(module)]


def faults(root: Path) -> list[str]:
    """Every import under ``root`` that the plan of the house forbids."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        source = module_of(path, root)
        for target in targets(path, root):
            at, to = floor(source), floor(target)
            if to > at:
                found.append(f"{source} (floor {at}) imports {target} (floor {to})")
            elif at == to == 4 and room(source) != room(target):
                found.append(f"{source} imports its sibling {target}")
            elif room(source) == room(target) == "deploy" and _engine(source) and _engine(target):
                if source != target:
                    found.append(f"engine {source} imports engine {target}")
    return found


def _engine(module: str) -> bool:
    return "." in module and module.split(".")[1] not in ENGINE_COMMON


def test_imports_only_go_down() -> None:
    assert faults(ROOT) == []


def test_every_module_has_its_floor() -> None:
    for path in ROOT.rglob("*.py"):
        floor(module_of(path, ROOT))


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"flow.py": "from fewstep.core.schedule import grid", "times.py": ""},
            "flow imports times",
        ),
        ({"flow.py": "from fewstep import cli", "cli.py": ""}, "flow imports cli"),
        ({"flow.py": "import fewstep.cli.app", "cli.py": ""}, "flow imports cli"),
        ({"flow.py": "def f():\n    import fewstep.cli.app", "cli.py": ""}, "flow imports cli"),
        ({"flow.py": "import fewstep"}, "flow imports __init__"),
        ({"train/a.py": "from fewstep.evaluate import b", "evaluate/b.py": ""}, "its sibling evaluate.b"),
        ({"export/onnx.py": "import fewstep.export.coreml", "export/coreml.py": ""}, "imports engine"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(fault in line for line in faults(tmp_path))


def test_allowed_imports_pass(tmp_path: Path) -> None:
    (tmp_path / "flow.py").write_text("import numpy\nfrom fewstep import __version__")
    (tmp_path / "cli.py").write_text(
        "from fewstep import flow\nfrom fewstep.core.flow import mix\nimport fewstep"
    )
    assert faults(tmp_path) == []


HEAVY = ("torch", "diffusers", "transformers", "scipy")


@pytest.mark.parametrize(
    "module", ["fewstep", "fewstep.pipeline.pipeline", "fewstep.runtime", "fewstep.cli.app"]
)
def test_the_base_install_loads_no_torch(module: str) -> None:
    assert importlib.util.find_spec("torch")  # it is there, so that loading it would be seen
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_floors_zero_and_one_load_numpy_alone() -> None:
    rooms = ", ".join(f"fewstep.{room}" for floor in (0, 1) for room in FLOORS[floor])
    code = f"import sys, {rooms}; print([n for n in {(*HEAVY, 'PIL', 'onnxruntime')} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
