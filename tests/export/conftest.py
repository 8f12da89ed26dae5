"""A tiny model and its traced graphs, shared by the export tests of a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock

import tiny
from fewstep.export.common import graphs
from fewstep.export.common.graphs import GraphSpec
from fewstep.families import sd3
from fewstep.families.base import Family


@pytest.fixture(scope="session")
def small() -> Family:
    """A random SD3 without T5 and without guidance."""
    return sd3.assemble(tiny.parts(with_t5=False), name="small", steps=4, guidance=None)


@pytest.fixture(scope="session")
def traced(small: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ONNX graphs of the small family by name.

    Tracing takes seconds. One process does it, and the other workers of the session read its files.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            unfinished.mkdir(exist_ok=True)
            for name, part in graphs.parts(small).items():
                onnx.save_model(graphs.trace(part), str(unfinished / f"{name}.onnx"))
            unfinished.rename(folder)
    return {path.stem: onnx.load(str(path)) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def trace_once(small: Family, traced: dict[str, Any]) -> Callable[[GraphSpec], Any]:
    """Stands in for :func:`fewstep.export.common.graphs.trace` where the small family is exported again."""
    names = {part.outputs: name for name, part in graphs.parts(small).items()}
    return lambda part: traced[names[part.outputs]]
