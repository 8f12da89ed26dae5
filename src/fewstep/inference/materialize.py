"""Loading of weights from files into a module on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.families.safetensors_match import tied
from fewstep.families.safetensors_weights import Weights
from fewstep.inference.meta_init import frozen_parameter
from fewstep.inference.quantize import quantize

WeightUpdate = Callable[[str, Tensor, torch.dtype], Tensor]
"""``(name, weight, dtype) -> weight``: applied to a weight before it is cast to ``dtype``."""


@dataclass(frozen=True)
class WeightLoader:
    """Reads the weights of a net, converts them and puts them on the device.

    Attributes:
        weights: tensors, matched to the net
            (:meth:`fewstep.families.safetensors_weights.Weights.matched`).
        device: the device.
        dtype: the data type.
        bits: bits per weight of the ``quantized`` layers.
        quantized: names of the linear layers to quantize.
        update: applied to each weight first, such as a LoRA.
        window: a tensor of which only a part is read: its name, its stored shape and the slices.
        pixels: whether convolution kernels are ``channels_last``. A CPU then convolves at twice the speed and
            without copies, a GPU with copies of one image instead of two.
    """

    weights: Weights
    device: str
    dtype: torch.dtype
    bits: int = 16
    quantized: frozenset[str] = frozenset()
    update: WeightUpdate | None = None
    window: tuple[str, tuple[int, ...], tuple[slice, ...]] | None = None
    pixels: bool = False

    def fill(self, module: Any, prefix: str = "") -> None:
        """Load the weights of ``module``, whose path in the net is ``prefix``.

        Raises:
            UserError: a weight is missing.
        """
        copies = tied(module)
        for path, layer in module.named_modules():
            for name, _ in [*layer.named_parameters(recurse=False), *_meta_buffers(layer)]:
                at = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                if at not in copies:
                    self._set(layer, name, at)
            for name, buffer in layer.named_buffers(recurse=False):
                layer._buffers[name] = buffer.to(self.device)  # buffers that files do not contain
            if self.bits < 16 and f"{prefix}{path}" in self.quantized:
                quantize(layer, self.bits, self.device)
        for target, source in copies.items():
            layer, _, name = target.rpartition(".")
            module.get_submodule(layer)._parameters[name] = module.get_parameter(source)

    def _set(self, layer: Any, name: str, at: str) -> None:
        if self.window is not None and at == self.window[0]:
            _, shape, slices = self.window
            tensor = self.weights.window(at, shape, slices).reshape(1, -1, shape[-1])
        else:
            tensor = self.weights.read(at)
        if self.update is not None:
            tensor = self.update(at, tensor, self.dtype)
        tensor = tensor.to(self.device, self.dtype)
        if self.pixels and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if name in layer._parameters:
            layer._parameters[name] = frozen_parameter(tensor)
        else:
            layer._buffers[name] = tensor


def _meta_buffers(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in layer.named_buffers(recurse=False) if buffer.is_meta]
