"""Model families in torch (floor 2): one file each, and the file is its registration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.types import Model


@dataclass(frozen=True, kw_only=True)
class Family(Model):
    """A model whose parts lie open, for training, export and study. Nothing in it requires a gradient.

    Attributes:
        net: the torch module behind ``velocity``; whoever trains it (or a copy) unfreezes it.
        blocks: its transformer blocks: where to shard, compile, checkpoint and tap.
        parts: the components by their diffusers names (``transformer``, ``vae``, ``text_encoder``, ...),
            ``None`` for one that is absent.
    """

    net: Any
    blocks: Sequence[Any]
    parts: Mapping[str, Any]
