"""Bytes that the weights of parts hold, by their shapes (floor 3, torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_plan import PlanConstraints
from fewstep.inference.meta_init import init_on_meta
from fewstep.inference.quantize import quantizable, quantized_nbytes
from fewstep.modules.adaln import split_modulation
from fewstep.modules.memory_tracker import ALLOCATED

QUANTIZING = 3
"""Float32 copies of a weight while torchao quantizes it."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a part: its shape, and whether it is a weight that may have few bits."""

    shape: tuple[int, ...]
    few: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightMemory:
    """What the parts of a model hold.

    Attributes:
        outline: of the model.
        asked: what it is to do.
    """

    outline: ModelSpec
    asked: PlanConstraints

    def dtype(self, bits: int) -> torch.dtype:
        """What a part of so many bits computes in."""
        return torch.float32 if (bits if bits >= 16 else self.asked.native) == 32 else torch.bfloat16

    @cached_property
    def modulated(self) -> tuple[Any, Any]:
        """The net's modulations, and the net without them."""
        return split_modulation(
            init_on_meta(self.outline, "transformer", torch.float32), self.outline.architecture.modulation
        )

    @cached_property
    def tensors(self) -> Mapping[str, list[Weight]]:
        """The tensors of each part; the modulations are a part of their own."""
        modulation, body = self.modulated
        found = {"modulation": self._listed("modulation", modulation)}
        for part in self.outline.configs:
            net = body if part == "transformer" else init_on_meta(self.outline, part, torch.float32)
            found[part] = self._listed(part, net)
        return found

    def _listed(self, part: str, net: Any) -> list[Weight]:
        few = {f"{name}.weight" for name in quantizable(self.outline, part, net)}
        tied = getattr(net, "_tied_weights_keys", None) or {}
        held = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
        return [Weight(self._cut(n, t), n in few) for n, t in held if n not in tied]

    def _cut(self, name: str, tensor: Any) -> tuple[int, ...]:
        if name != self.outline.architecture.position_table:
            return tuple(tensor.shape)
        return (1, self.outline.pos_embed_crop(self.asked.latents) ** 2, tensor.shape[-1])

    def _of(self, weight: Weight, bits: int) -> int:
        wide = self.dtype(bits).itemsize
        few = weight.few and bits < 16
        count = quantized_nbytes(weight.shape[0], weight.shape[1], bits, wide) if few else wide * weight.count
        return -(-count // ALLOCATED) * ALLOCATED if self.asked.gpu else count

    def weights(self, part: str, bits: int) -> int:
        """A part's weights."""
        return sum(self._of(weight, bits) for weight in self.tensors[part])

    def layer(self, bits: int) -> int:
        """The largest of :meth:`layers`."""
        return max(self.layers(bits), default=0)

    def layers(self, bits: int) -> list[int]:
        """What comes one by one of the modulations: what embeds the time, and each layer."""
        modulation = self.modulated[0]
        modules = (modulation.embedder, *modulation.layers) if modulation.layers else ()
        apart = (self._listed("modulation", one) for one in modules)
        return [sum(self._of(weight, bits) for weight in one) for one in apart]

    def reading(self, part: str, bits: int) -> int:
        """At most while a part is read: a tensor as its file has it, beside what is made of it."""
        stored = self.outline.stored.get(part, 2)
        wide = self.dtype(bits).itemsize
        so_far, most = 0, 0
        for weight in self.tensors[part]:
            so_far += self._of(weight, bits)
            beside = 0 if self.asked.gpu or stored == wide else stored * weight.count
            if weight.few and bits < 16:
                beside += (wide + 4 * QUANTIZING) * weight.count
            most = max(most, so_far + beside)
        return most
