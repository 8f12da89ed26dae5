"""Model families in torch: one file each, and the file is its registration."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.core.types import Model, UserError


@dataclass(frozen=True, kw_only=True)
class Family(Model):
    """A model whose parts lie open, for training, export and study. Nothing in it requires a gradient.

    Attributes:
        net: the torch module behind ``velocity``; whoever trains it (or a copy) unfreezes it.
        blocks: its transformer blocks: where to shard, compile, checkpoint and tap.
        parts: the components by their diffusers names (``transformer``, ``vae``, ``text_encoder``, ...),
            ``None`` for one that is absent.
        clip_length: how many rows of a context come first and are the CLIPs'; what follows them is T5's and
            may be left out. ``None`` where nothing may.
        kind: name of its family's module here.
    """

    net: Any
    blocks: Sequence[Any]
    parts: Mapping[str, Any]
    kind: str
    clip_length: int | None = None

    def student(self, net: Any, name: str, steps: int) -> Family:
        """The same model with another net of the same kind, one that needs ``steps`` steps and no
        guidance."""
        return self.module.student(self, net, name, steps)

    def without_t5(self) -> Family:
        """The same model without its T5; the very same where it has none, or cannot do without."""
        return self.module.without_t5(self) if self.clip_length is not None else self

    @property
    def module(self) -> ModuleType:
        """The family's module: it has ``load``, ``save`` and ``student``."""
        return importlib.import_module(f"fewstep.families.{self.kind}")

    def with_guidance(self, guidance: float) -> Family:
        """The same model at another guidance scale: that of its second pass, or the embedded one.

        Raises:
            UserError: guidance is distilled into the net, and it cannot be told any.
        """
        if self.guidance is not None:
            return replace(self, guidance=guidance)
        if self.embedded_guidance is None:
            raise UserError(f"model {self.name} takes no guidance: guidance is distilled into it")
        velocity: Any = self.velocity
        return replace(self, velocity=velocity.with_guidance(guidance), embedded_guidance=guidance)


def family_of(folder: Path) -> ModuleType:
    """The module of the family whose ``PIPELINE`` a diffusers folder names: it has ``load`` and ``save``.

    Raises:
        UserError: not a diffusers folder, or a pipeline of no family here.
    """
    from fewstep import families
    from fewstep.families.config_check import is_plain
    from fewstep.families.diffusers_io import read_pipeline

    kind, _ = read_pipeline(folder)
    known: list[str] = []
    for found in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(
            f"fewstep.families.{found.name}"
        )  # light: networks load in functions
        pipeline = getattr(module, "PIPELINE", None)
        if pipeline and is_plain(kind, pipeline):
            return module
        known += [pipeline] if pipeline else []
    raise UserError(f"{folder} holds a {kind}; what can be read is a {' or a '.join(known)}")
