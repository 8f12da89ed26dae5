"""Deployment engines: one file each, and none knows another.

A module here that has ``BITS`` is a target of ``fewstep export``, by its own name; it is found, not listed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from fewstep.families.base import Family
from fewstep.runtime.bundle import Bundle, Compute


@dataclass(frozen=True)
class ExportMetadata:
    """What an export tells of itself.

    Attributes:
        license: of the weights, such as ``Apache-2.0``.
        license_file: its text, to ship along.
        about: free facts.
        card: the model card, to ship along.
        compute: what its graphs compute in.
    """

    license: str = "unknown"
    license_file: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    card: Path | None = None
    compute: Compute = "float32"


class Target(Protocol):
    """A module of this room that writes a model for an engine.

    Attributes:
        FAMILIES: kinds of families that it can write.
        BITS: bits a weight that it can store, its default first.
        T5: whether it takes T5 along where nobody says.
    """

    FAMILIES: tuple[str, ...]
    BITS: tuple[int, ...]
    T5: bool

    def needs(self, bits: int) -> tuple[str, ...]:
        """Modules that writing so many bits a weight takes, besides PyTorch's."""
        ...

    def check(self, out: Path) -> None:
        """Refuse what is known before a model is loaded.

        Raises:
            UserError: something else lies at ``out``, or it has a wrong name.
            ImportError: the engine's tools are not installed.
        """
        ...

    def export(self, family: Family, out: Path, bits: int, facts: ExportMetadata) -> str:
        """Write ``family`` (float32, on the processor) to ``out``, whole or not at all; an earlier export
        there is replaced.

        Returns:
            What there is now, in a line.

        Raises:
            UserError: something else lies at ``out``, or this family cannot be written so.
        """
        ...


@runtime_checkable
class SupportsT5Bits(Target, Protocol):
    """A target that can store T5 in bits of its own.

    Attributes:
        T5_BITS: those.
    """

    T5_BITS: tuple[int, ...]

    def export(
        self, family: Family, out: Path, bits: int, facts: ExportMetadata, *, t5_bits: int | None = None
    ) -> str:
        """As any target's; ``t5_bits`` a weight of T5, as all others where ``None``."""
        ...


@runtime_checkable
class SupportsComputeDtype(Target, Protocol):
    """A target whose graphs can compute in something else than float32.

    Attributes:
        COMPUTES: in what, float32 among them.
    """

    COMPUTES: tuple[Compute, ...]


@runtime_checkable
class ConvertsBundle(Target, Protocol):
    """A target that can be made of a bundle for onnxruntime as well, without PyTorch."""

    def convert(self, bundle: Bundle, out: Path, bits: int, told: Mapping[str, Any]) -> str:
        """Write ``bundle`` anew; the rest as :meth:`Target.export`.

        Args:
            bundle: for onnxruntime.
            out: where it goes.
            bits: of ``BITS``, a weight; those of the bundle are rounded once more.
            told: what it shall tell of itself: the fields of ``bundle.json`` but ``format``, ``files`` and
                ``engine``.
        """
        ...


def targets() -> dict[str, Target]:
    """Every target by its name. Importing one is light: engines are imported in functions."""
    from fewstep import export

    names = sorted(found.name for found in pkgutil.iter_modules(export.__path__) if not found.ispkg)
    modules = {name.replace("_", "-"): importlib.import_module(f"fewstep.export.{name}") for name in names}
    return {name: cast("Target", module) for name, module in modules.items() if hasattr(module, "BITS")}
