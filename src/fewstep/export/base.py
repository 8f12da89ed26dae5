"""The interface of an export target, and the search for targets.

A target is one module that writes a model for one engine. Every module of this package that has ``BITS`` is
one, and no target imports another. A module outside the package is one if it has the same attributes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from fewstep.core import plugins
from fewstep.core.types import UserError
from fewstep.families.base import Family
from fewstep.runtime.bundle import Bundle, Compute

PACKAGE = "fewstep.export"


@dataclass(frozen=True)
class ExportMetadata:
    """Metadata that an export stores.

    Attributes:
        license: name of the licence of the weights, such as ``Apache-2.0``.
        license_file: the text of the licence, which is copied.
        about: further fields, stored as they are.
        card: the model card, which is copied.
        compute: number type in which the graphs compute.
    """

    license: str = "unknown"
    license_file: Path | None = None
    about: Mapping[str, object] = field(default_factory=dict[str, object])
    card: Path | None = None
    compute: Compute = "float32"


@runtime_checkable
class Target(Protocol):
    """A module that writes a model for an engine.

    Attributes:
        FAMILIES: kinds of families that it can write.
        BITS: supported bits per weight, the default first.
        T5: whether T5 is written by default.
    """

    FAMILIES: tuple[str, ...]
    BITS: tuple[int, ...]
    T5: bool

    def needs(self, bits: int) -> tuple[str, ...]:
        """Return the modules that this many bits per weight require, besides PyTorch's."""
        ...

    def check(self, out: Path) -> None:
        """Check the destination and the engine's tools, before a model is loaded.

        Raises:
            UserError: something else exists at ``out``, or it has a wrong name.
            ImportError: the engine's tools are not installed.
        """
        ...

    def export(self, family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
        """Write ``family`` to ``out`` and describe the result in one line.

        The export is atomic. An earlier export at ``out`` is replaced.

        Args:
            family: the model, in float32 on the CPU.
            out: the folder or file to write.
            bits: bits per weight, one of :attr:`BITS`.
            metadata: metadata to store.

        Raises:
            UserError: something else exists at ``out``, or the target does not support this family.
        """
        ...


@runtime_checkable
class SupportsT5Bits(Target, Protocol):
    """A target that can store T5 with its own number of bits per weight.

    Attributes:
        T5_BITS: supported bits per weight of T5.
    """

    T5_BITS: tuple[int, ...]

    def export(
        self, family: Family, out: Path, bits: int, metadata: ExportMetadata, *, t5_bits: int | None = None
    ) -> str:
        """Write ``family`` as :meth:`Target.export` does; ``t5_bits`` are ``bits`` where ``None``."""
        ...


@runtime_checkable
class SupportsComputeDtype(Target, Protocol):
    """A target whose graphs can compute in other number types than float32.

    Attributes:
        COMPUTES: supported number types, float32 among them.
    """

    COMPUTES: tuple[Compute, ...]


@runtime_checkable
class ConvertsBundle(Target, Protocol):
    """A target that can also convert a bundle for onnxruntime, without PyTorch."""

    def convert(self, bundle: Bundle, out: Path, bits: int, fields: Mapping[str, object]) -> str:
        """Convert ``bundle`` and describe the result in one line, as :meth:`Target.export` does.

        Args:
            bundle: a bundle for onnxruntime.
            out: the folder to write.
            bits: bits per weight, one of :attr:`BITS`. The weights of the bundle are rounded a second time.
            fields: the fields of the new ``bundle.json`` but ``format``, ``files`` and ``engine``.
        """
        ...


def targets() -> dict[str, Target]:
    """Return the targets of this package by name. They import their engines only when used."""
    package = importlib.import_module(PACKAGE)
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.ispkg)
    modules = {name.replace("_", "-"): importlib.import_module(f"{PACKAGE}.{name}") for name in names}
    return {name: cast("Target", module) for name, module in modules.items() if hasattr(module, "BITS")}


def find_target(name: str) -> Target:
    """Return the export target of this name.

    Args:
        name: a target of this package (``single-file``), an import path (``package.module`` or
            ``package.module:attribute``), or an entry point of the group ``fewstep.target``.

    Raises:
        UserError: there is no such target, or the import path leads to something else.
    """
    known = targets()
    target = known[name] if name in known else plugins.load_external(name, "target", list(known))
    if not isinstance(target, Target):
        raise UserError(f"{name} is no export target: it needs FAMILIES, BITS, T5, needs, check and export")
    return target
