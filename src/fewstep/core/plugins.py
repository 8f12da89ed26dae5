"""Loads extensions by name: a module of the package, an import path of the user's, or an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from fewstep.core.types import UserError


def names(package: str) -> list[str]:
    """Return the names of the public modules of ``package``, with dashes for underscores."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(each.name.replace("_", "-") for each in found if not each.name.startswith("_"))


def load(spec: str, package: str, kind: str) -> Any:
    """Import the extension that ``spec`` names.

    A plain name is a module of ``package``. A name with a dot or a colon, ``package.module`` or
    ``package.module:attribute``, is imported from the Python path. Any other name is looked up among the
    entry points of the group ``fewstep.KIND``.

    The caller passes only what the command line, Python code or the user's own configuration says. A name
    from a model, data or run folder is never imported.

    Args:
        spec: the name or import path.
        package: the package that holds the built-in extensions, such as ``fewstep.export``.
        kind: what is named, for the entry-point group and the error message, such as ``bench_engine``.

    Raises:
        UserError: there is no such extension, or it cannot be imported.
    """
    if spec in (known := names(package)):
        return importlib.import_module(f"{package}.{spec.replace('-', '_')}")
    return load_external(spec, kind, known)


def load_external(spec: str, kind: str, known: Sequence[str] = ()) -> Any:
    """Import an extension from outside the package: by an import path, or by the name of an entry point.

    Args:
        spec: see :func:`load`.
        kind: see :func:`load`.
        known: names of the built-in extensions, for the error message.

    Raises:
        UserError: there is no such extension, or it cannot be imported.
    """
    label = kind.replace("_", " ")
    points = {point.name: point for point in entry_points(group=f"fewstep.{kind}")}
    try:
        if spec in points:
            return points[spec].load()
        if "." in spec or ":" in spec:
            module_name, _, attribute = spec.partition(":")
            if module_name.startswith("."):
                raise ValueError("a relative import path")
            module = importlib.import_module(module_name)
            return getattr(module, attribute) if attribute else module
    except Exception as error:  # whatever the code of others raises
        reason = " ".join(str(error).split()) or "no reason is given"
        named = (
            ""
            if isinstance(error, (ImportError, AttributeError, ValueError))
            else type(error).__name__ + ": "
        )
        raise UserError(f"cannot import the {label} {spec}: {named}{reason}") from error
    listed = ", ".join([*known, *sorted(points)])
    raise UserError(
        f"there is no {label} {spec}: give one of {listed}, or an import path (a single module as {spec}:)"
    )
