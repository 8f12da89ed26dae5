"""Sizes of the weights of a model's parts, from their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_plan import PlanConstraints
from fewstep.inference.meta_init import init_on_meta
from fewstep.inference.quantize import quantizable, quantized_nbytes
from fewstep.modules.adaln import Modulation, split_modulation
from fewstep.modules.memory_tracker import ALLOCATED

QUANTIZING = 3
"""Number of float32 copies of a weight while torchao quantizes it."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a part: its shape, and whether it may be quantized."""

    shape: tuple[int, ...]
    quantizable: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightMemory:
    """Sizes of a model's weights.

    Attributes:
        spec: the model.
        constraints: device, candidates and workload.
    """

    spec: ModelSpec
    constraints: PlanConstraints

    def dtype(self, bits: int) -> torch.dtype:
        """Return the data type in which a part with this many bits per weight computes."""
        return torch.float32 if (bits if bits >= 16 else self.constraints.native) == 32 else torch.bfloat16

    @cached_property
    def modulated(self) -> tuple[Modulation, nn.Module]:
        """The net's modulation layers, and the net without them."""
        return split_modulation(
            init_on_meta(self.spec, "transformer", torch.float32), self.spec.architecture.modulation
        )

    @cached_property
    def tensors(self) -> Mapping[str, list[Weight]]:
        """The tensors of each part. The modulations are a part of their own."""
        modulation, body = self.modulated
        tensors = {"modulation": self._listed("modulation", modulation)}
        for part in self.spec.configs:
            net = body if part == "transformer" else init_on_meta(self.spec, part, torch.float32)
            tensors[part] = self._listed(part, net)
        return tensors

    def _listed(self, part: str, net: nn.Module) -> list[Weight]:
        quantized = {f"{name}.weight" for name in quantizable(self.spec, part, net)}
        tied = getattr(net, "_tied_weights_keys", None) or {}
        tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
        return [Weight(self._cropped(n, t), n in quantized) for n, t in tensors if n not in tied]

    def _cropped(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        if name != self.spec.architecture.position_table:
            return tuple(tensor.shape)
        return (1, self.spec.pos_embed_crop(self.constraints.latents) ** 2, tensor.shape[-1])

    def _nbytes(self, weight: Weight, bits: int) -> int:
        wide = self.dtype(bits).itemsize
        quantized = weight.quantizable and bits < 16
        count = (
            quantized_nbytes(weight.shape[0], weight.shape[1], bits, wide)
            if quantized
            else wide * weight.count
        )
        return -(-count // ALLOCATED) * ALLOCATED if self.constraints.gpu else count

    def weights(self, part: str, bits: int) -> int:
        """Return the size of a part's weights in bytes."""
        return sum(self._nbytes(weight, bits) for weight in self.tensors[part])

    def layer(self, bits: int) -> int:
        """Return the size of the largest of :meth:`layers` in bytes."""
        return max(self.layers(bits), default=0)

    def layers(self, bits: int) -> list[int]:
        """Return the sizes of the time embedder and of each modulation layer, which are loaded one by one."""
        modulation = self.modulated[0]
        modules = (modulation.embedder, *modulation.layers) if modulation.layers else ()
        layers = (self._listed("modulation", layer) for layer in modules)
        return [sum(self._nbytes(weight, bits) for weight in layer) for layer in layers]

    def reading(self, part: str, bits: int) -> int:
        """Return the peak bytes while a part is read.

        A tensor as stored in the file is in memory beside its converted copy.
        """
        stored = self.spec.stored.get(part, 2)
        wide = self.dtype(bits).itemsize
        loaded, peak = 0, 0
        for weight in self.tensors[part]:
            loaded += self._nbytes(weight, bits)
            temporary = 0 if self.constraints.gpu or stored == wide else stored * weight.count
            if weight.quantizable and bits < 16:
                temporary += (wide + 4 * QUANTIZING) * weight.count
            peak = max(peak, loaded + temporary)
        return peak
