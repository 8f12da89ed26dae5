"""Offloaded text encoders with a cache of prompt embeddings."""

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
from fewstep.inference.offload import OffloadedModule, OffloadManager

CACHED = 64
"""Number of prompts whose embeddings are cached."""


@dataclass
class CachedTextEncoder:
    """Text encoders with a cache of embeddings.

    Attributes:
        encode: the family's text encoder, made of :class:`UnbatchedEncoder`.
        device: device of the embeddings that are returned.
        dtype: data type of the encoders and of the cache.
    """

    encode: TextEncoder
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._cache: OrderedDict[str, Cond] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Encode ``B`` prompts as context ``[B, L, D]`` and pooled ``[B, P]``, float32."""
        self.prepare(prompts)
        rows = [self._cache[text] for text in prompts]
        context, pooled = (
            torch.cat([getattr(row, name).to(self.device, non_blocking=True) for row in rows]).float()
            for name in ("context", "pooled")
        )
        return Cond(context, pooled)

    def _to_host(self, array: Tensor) -> Tensor:
        """Copy to CPU memory. The copy need not be awaited, because only the same GPU reads it."""
        array = array.to(self.dtype)
        if self.device == "cpu":
            return array
        return torch.empty_like(array, device="cpu", pin_memory=True).copy_(array, non_blocking=True)

    def clear_cache(self) -> None:
        """Remove all prompts from the cache."""
        self._cache.clear()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts that are not in the cache, before the net needs the memory; drop the oldest."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._cache]
        if not new:
            return
        cond = self.encode(new).map(self._to_host)
        for row, text in enumerate(new):
            self._cache[text] = cond[row : row + 1]
        while len(self._cache) > max(CACHED, len(set(prompts))):
            self._cache.popitem(last=False)


@dataclass(frozen=True)
class UnbatchedEncoder:
    """An offloaded text encoder that encodes one prompt at a time.

    So an embedding does not depend on the batch, and many prompts need no more memory.

    Attributes:
        manager: the manager of the encoder.
        name: name of its part.
        graph_cache: CUDA graphs, if the encoder is resident.
    """

    manager: OffloadManager
    name: str
    graph_cache: CUDAGraphCache | None = None

    @property
    def config(self) -> Any:
        return self._part.module.config

    @property
    def device(self) -> str:
        return self._part.source.device

    @property
    def _part(self) -> OffloadedModule:
        return self.manager.parts[self.name]

    def __call__(self, ids: Tensor, **options: object) -> BatchedOutput:
        """Encode token ids ``[B, L]``."""
        encoder = self.manager.acquire(self.name)

        def encode(row: Tensor) -> Any:
            return _last_states(encoder(row, **options))

        run = encode if self.graph_cache is None else partial(self.graph_cache, self.name, encode)
        return BatchedOutput([run(row) for row in ids.split(1)])


def _last_states(out: Any) -> Any:
    """Keep only the last two hidden states of an encoder's output; families use the last but one."""
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = out.hidden_states[-2:]
    return out


@dataclass(frozen=True)
class BatchedOutput:
    """Outputs of single prompts, accessed as the output of a batch."""

    each: Sequence[Any]

    def __getattr__(self, name: str) -> Tensor | list[Tensor]:
        values = [getattr(out, name) for out in self.each]
        if isinstance(values[0], tuple):
            return [torch.cat(parts) for parts in zip(*values, strict=True)]
        return torch.cat(values)

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([out[index] for out in self.each])
