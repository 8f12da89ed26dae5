"""Text encoders that come when they are to read, and are remembered (floor 3, torch)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.core.types import Cond, TextEncoder
from fewstep.inference.cuda_graphs import CUDAGraphCache
from fewstep.inference.offload import OffloadManager

CACHED = 64
"""Prompts whose embeddings are kept, in the precision that their encoders speak."""


@dataclass
class CachedTextEncoder:
    """Text encoders that remember what they read.

    Attributes:
        encode: the family's, whose encoders read a prompt at a time (:class:`UnbatchedEncoder`).
        device: where conditions go.
        dtype: what the encoders compute in.
    """

    encode: TextEncoder
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._known: OrderedDict[str, Cond] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` prompts -> context ``[B, L, D]`` and pooled ``[B, P]``, float32."""
        self.prepare(prompts)
        rows = [self._known[text] for text in prompts]
        context, pooled = (
            torch.cat([getattr(row, name).to(self.device, non_blocking=True) for row in rows]).float()
            for name in ("context", "pooled")
        )
        return Cond(context, pooled)

    def _kept(self, array: Tensor) -> Tensor:
        """In the CPU's memory; nobody waits until a GPU has written it, for it alone reads it."""
        array = array.to(self.dtype)
        if self.device == "cpu":
            return array
        return torch.empty_like(array, device="cpu", pin_memory=True).copy_(array, non_blocking=True)

    def clear_cache(self) -> None:
        """Forget all prompts."""
        self._known.clear()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Read prompts that are not known, before the net needs the room; the oldest are forgotten."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._known]
        if not new:
            return
        made = self.encode(new).map(self._kept)
        for row, text in enumerate(new):
            self._known[text] = made[row : row + 1]
        while len(self._known) > max(CACHED, len(set(prompts))):
            self._known.popitem(last=False)


@dataclass(frozen=True)
class UnbatchedEncoder:
    """A text encoder that comes when it is to read, and reads a prompt at a time: what it says does not
    depend on what else is read, and many prompts need no more memory.

    Attributes:
        place: where it comes.
        name: of its part.
        again: what reads at once, where the encoder stays in its place.
    """

    place: OffloadManager
    name: str
    again: CUDAGraphCache | None = None

    @property
    def config(self) -> Any:
        return self._part.module.config

    @property
    def device(self) -> str:
        return self._part.source.device

    @property
    def _part(self) -> Any:
        return self.place.parts[self.name]

    def __call__(self, ids: Tensor, **options: Any) -> BatchedOutput:
        """Token ids ``[B, L]`` -> what the encoder gives for each."""
        encoder = self.place.acquire(self.name)

        def read(row: Tensor) -> Any:
            return _short(encoder(row, **options))

        once = read if self.again is None else partial(self.again, self.name, read)
        return BatchedOutput([once(row) for row in ids.split(1)])


def _short(out: Any) -> Any:
    """An encoder's output with the last of its hidden states alone: a family takes the last but one."""
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = out.hidden_states[-2:]
    return out


@dataclass(frozen=True)
class BatchedOutput:
    """Outputs of an encoder for one prompt each, read as one for all."""

    each: Sequence[Any]

    def __getattr__(self, name: str) -> Any:
        found = [getattr(out, name) for out in self.each]
        if isinstance(found[0], tuple):
            return [torch.cat(parts) for parts in zip(*found, strict=True)]
        return torch.cat(found)

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([out[index] for out in self.each])
