"""The layers of docs/architecture.md: imports go down, and no file is part of a circle."""

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
LAYERS = (
    ("core",),
    ("images", "runtime", "modules", "families", "client"),
    ("scorers", "data", "methods", "inference"),
    ("pipeline", "export"),
    ("train", "evaluate", "bench", "serve", "study", "site"),
    ("distill", "pocket", "fashion"),
    ("experiments",),
    ("__init__", "cli", "__main__"),
)
"""A package imports from lower layers, and within its own from packages that stand before it."""

ALONE = 5
"""In this layer, counted from 1, no package imports another."""

PLACES = {package: (layer, i) for layer, names in enumerate(LAYERS, 1) for i, package in enumerate(names)}


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[str]:
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
            if package == "fewstep" and rest != "__version__":
                yield _existing(rest, root)


def _existing(dotted: str, root: Path) -> str:
    """Return the longest part of a dotted name that is a module: ``core.flow`` of ``core.flow.mix``."""
    parts = dotted.split(".") if dotted else []
    while parts:
        place = root.joinpath(*parts)
        if place.is_dir() or place.with_suffix(".py").is_file():
            return ".".join(parts)
        parts.pop()
    return "__init__"


def package_of(module: str) -> str:
    return module.split(".")[0]


def violations(root: Path) -> list[str]:
    """Return a line for every import under ``root`` that the layers forbid."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        source = module_of(path, root)
        for target in imports(path, root):
            one, other = package_of(source), package_of(target)
            (layer, position), (below, before) = PLACES[one], PLACES[other]
            if below > layer:
                found.append(f"{source} (layer {layer}) imports {target} (layer {below})")
            elif one != other and below == layer and (layer == ALONE or before > position):
                found.append(f"{source} imports its neighbour {target}")
            elif one == other == "export" and _target(source) and _target(target) and source != target:
                found.append(f"target {source} imports target {target}")
    return found


def _target(module: str) -> bool:
    """Return whether a module of ``export`` is an export target."""
    path = ROOT / "export" / f"{module.partition('.')[2]}.py"
    return path.is_file() and "\nBITS" in path.read_text(encoding="utf-8")


def circles(root: Path) -> list[list[str]]:
    """Return the groups of files that import each other, directly or over others."""
    graph: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        module = module_of(path, root)
        if module not in ("__init__", "__main__"):
            graph[module] = {name for name in imports(path, root) if name not in (module, "__init__")}
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(n for n in reach if module in reached.get(n, ()))) for module, reach in reached.items()
    }
    return sorted(list(group) for group in groups if group)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph.get(module, ())
    return seen


def test_imports_only_go_down() -> None:
    assert violations(ROOT) == []


def test_no_file_is_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_every_package_has_its_layer() -> None:
    assert {package_of(module_of(path, ROOT)) for path in ROOT.rglob("*.py")} <= set(PLACES)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"core/flow.py": "from fewstep.cli import app", "cli/app.py": ""},
            "core.flow (layer 1) imports cli.app",
        ),
        ({"core/flow.py": "import fewstep.cli.app", "cli/app.py": ""}, "core.flow (layer 1) imports cli.app"),
        (
            {"core/flow.py": "def f():\n    import fewstep.cli", "cli/app.py": ""},
            "core.flow (layer 1) imports cli",
        ),
        ({"core/flow.py": "import fewstep"}, "core.flow (layer 1) imports __init__"),
        ({"train/a.py": "from fewstep.evaluate import b", "evaluate/b.py": ""}, "its neighbour evaluate.b"),
        ({"images/a.py": "from fewstep.families import b", "families/b.py": ""}, "its neighbour families.b"),
        ({"export/onnx.py": "import fewstep.export.coreml", "export/coreml.py": ""}, "imports target"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, files: dict[str, str], line: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert any(line in found for found in violations(tmp_path))


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        (tmp_path / "core").mkdir(exist_ok=True)
        (tmp_path / "core" / f"{name}.py").write_text(f"def f():\n    from fewstep.core.{other} import x")
    assert circles(tmp_path) == [["core.a", "core.b", "core.c"]]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    for name, text in {
        "core/flow.py": "import numpy\nfrom fewstep import __version__",
        "families/a.py": "from fewstep.images import b\nfrom fewstep.core.flow import interpolate",
        "images/b.py": "",
        "cli/app.py": "from fewstep.core import flow\nimport fewstep",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert violations(tmp_path) == circles(tmp_path) == []


HEAVY = ("torch", "diffusers", "transformers", "scipy")


@pytest.mark.parametrize(
    "module", ["fewstep", "fewstep.pipeline.pipeline", "fewstep.runtime", "fewstep.cli.app"]
)
def test_the_base_install_loads_no_torch(module: str) -> None:
    assert importlib.util.find_spec("torch")  # it is there, so that loading it would be seen
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_core_loads_numpy_alone() -> None:
    modules = ", ".join(f"fewstep.{module_of(path, ROOT)}" for path in sorted((ROOT / "core").glob("*.py")))
    code = f"import sys, {modules}; print([n for n in {(*HEAVY, 'PIL', 'onnxruntime')} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
