"""Runtime engines: each opens the graphs of the bundles of one kind.

An engine is a module that follows :class:`RuntimeEngine`. The field ``engine`` of ``bundle.json`` selects one
of the engines here. An engine from outside is named in ``fewstep.load(folder, backend="my.module")`` or with
``--backend my.module``: by its import path or an entry point of the group ``fewstep.runtime_engine``. A
bundle never names a module.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from fewstep.core import plugins
from fewstep.core.types import UserError
from fewstep.runtime.bundle import SUFFIXES, Bundle
from fewstep.runtime.session import Session

MODULES = {"onnx": "ort", "openvino": "openvino", "executorch": "executorch"}
"""Module here of each engine."""


class RuntimeEngine(Protocol):
    """A module that opens the graphs of bundles.

    Attributes:
        FORMAT: the field ``engine`` of the bundles that it opens: one of its own, or a known one.
        SUFFIXES: endings of the files of a graph; the first file is the one that is loaded.
    """

    FORMAT: str
    SUFFIXES: Sequence[str]

    def open_graph(self, bundle: Bundle, stem: str, threads: int) -> Session:
        """Return the session of one graph. It loads the graph when it is started or first called.

        Args:
            bundle: the bundle, whose ``graph(stem)`` is the graph's file.
            stem: ``text``, ``t5``, ``modulation``, ``transformer``, ``decoder`` or ``encoder``.
            threads: threads inside one operator.

        Raises:
            UserError: the bundle has no such graph.
        """
        ...


def built_in(bundle: Bundle) -> RuntimeEngine:
    """Return the engine of a bundle of a known kind.

    Raises:
        ImportError: its library is not installed.
    """
    return cast("RuntimeEngine", importlib.import_module(f"fewstep.runtime.{MODULES[bundle.engine]}"))


def external(spec: str) -> RuntimeEngine:
    """Import an engine from outside the package by its import path or entry point.

    Raises:
        UserError: there is no such engine, or it lacks a part of the protocol.
    """
    engine: Any = plugins.load_external(spec, "runtime_engine", [*SUFFIXES, "torch"])
    if missing := [name for name in ("FORMAT", "SUFFIXES", "open_graph") if not hasattr(engine, name)]:
        raise UserError(f"the runtime engine {spec} has no {missing[0]}")
    return engine
