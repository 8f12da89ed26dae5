"""Families by name, by import path, and by a model's files."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from fewstep.core import plugins
from fewstep.core.types import UserError
from fewstep.families.base import Architecture
from fewstep.families.config_check import is_plain
from fewstep.families.diffusers_io import read_pipeline

PACKAGE = "fewstep.families"


@cache
def built_in() -> Mapping[str, Architecture]:
    """Return the families of the package by name. Their networks are imported when a model is loaded."""
    names = sorted(found.name for found in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__))
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    families = [module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE")]
    return {family.name: family for family in families}


def architecture(name: str) -> Architecture:
    """Return the family of a name that a caller gives: never one that a model folder gives.

    Args:
        name: a built-in family, an entry point of the group ``fewstep.family``, or the import path of a
            module that has an ``ARCHITECTURE``, such as ``my_package.my_family``.

    Raises:
        UserError: there is no such family, or it cannot be imported.
    """
    if name in built_in():
        return built_in()[name]
    if name in _entry_points():
        try:
            found: object = _entry_points()[name].load()
        except Exception as error:  # whatever the code of others raises
            raise UserError(f"cannot import the family {name}: {type(error).__name__}: {error}") from error
    else:
        found = plugins.load(f"{name}:ARCHITECTURE", PACKAGE, "family")
    found = getattr(found, "ARCHITECTURE", found)
    if not isinstance(found, Architecture):
        raise UserError(f"{name} is no family: its ARCHITECTURE is a {type(found).__name__}")
    return found


def parse_family(name: str) -> tuple[str | None, str]:
    """Split ``FAMILY:MODEL`` into the family's name for :func:`architecture` and the model.

    Returns:
        ``(None, name)`` where no family is in front: ``name`` is a path that exists, or what is in front of
        the colon is neither a family nor a module that can be imported.
    """
    family, colon, model = name.partition(":")
    if not colon:
        return None, name
    if family in built_in() or (not os.path.lexists(name) and _is_outside(family)):
        return family, model
    return None, name


def _is_outside(name: str) -> bool:
    if name in _entry_points():
        return True
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    return len(parts) > 1 or importlib.util.find_spec(name) is not None


@cache
def _entry_points() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="fewstep.family")}


def architecture_of(folder: Path, asked: Architecture | None = None) -> Architecture:
    """Return the family whose pipeline a diffusers folder names.

    Args:
        folder: the folder.
        asked: a family that the caller names, which need not be built in.

    Raises:
        UserError: not a diffusers folder, or a pipeline of no known family.
    """
    pipeline, _ = read_pipeline(folder)
    known = [*([] if asked is None else [asked]), *built_in().values()]
    for each in known:
        if is_plain(pipeline, each.pipeline):
            return each
    names = " or a ".join(dict.fromkeys(each.pipeline for each in known))
    raise UserError(f"{folder} holds a {pipeline}; what can be read is a {names}")


def architecture_of_files(asked: Architecture | None = None) -> Architecture:
    """Return the family that reads single-file checkpoints: ``asked`` if it does, or the built-in one."""
    if asked is not None and asked.single_files:
        return asked
    return next(each for each in built_in().values() if each.single_files)
