"""Fewer bits a weight (floor 3, torch): 8 by torchao; 4 packed here, for torchao's kernels of 4 bits are made
for a few rows, and a picture's thousands take them ten times what unpacking and a usual product take."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.staged.outline import Outline
from fewstep.types import UserError

GROUP = 64
"""Weights of a row that share a scale, in 4 bits; fewer where a row's are no multiple."""


def check(bits: int, device: str) -> None:
    """Refuse bits that the device has no kernels for.

    Raises:
        UserError: it has none, there are no such bits, or torchao is not installed.
    """
    if bits not in (32, 16, 8, 4):
        raise UserError(f"bits must be 32, 16, 8 or 4, not {bits}")
    lack = lacking(bits, device)
    if lack is not None:
        raise UserError(f"--bits {bits} needs {lack}")


def lacking(bits: int, device: str) -> str | None:
    """What the device or this installation lacks for so few bits, if anything."""
    if bits >= 16:
        return None
    if bits == 8 and importlib.util.find_spec("torchao") is None:
        return "torchao, which is not installed: pip install 'fewstep[torchao]'"
    if bits == 4 and device == "cpu":
        return "a GPU; give --bits 8"
    return None


def quantize(linear: nn.Linear, bits: int, device: str) -> None:
    """Store the weight of a layer in so few bits, in place.

    Args:
        linear: the layer, its weight on ``device``.
        bits: 8 or 4.
        device: ``cpu`` or ``cuda``.
    """
    if bits == 4:
        pack(linear)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao: Any = importlib.import_module("torchao.quantization")
        if device == "cpu":
            config: Any = ao.Int8WeightOnlyConfig(version=2)
        else:
            config = ao.Int8DynamicActivationInt8WeightConfig(version=2)
        ao.quantize_(linear, config, filter_fn=_linear)


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def in_bytes(rows: int, columns: int, bits: int, wide: int) -> int:
    """Bytes of a weight ``[rows, columns]``.

    Args:
        rows: and
        columns: its shape.
        bits: 32, 16, 8 or 4.
        wide: bytes of a number in the precision that the net computes in.
    """
    if bits >= 16:
        return rows * columns * bits // 8
    if bits == 8:
        return rows * (columns + wide)
    return rows * columns // 2 + rows * (columns // group_of(columns)) * 2 * wide


class Packed(nn.Linear):
    """A linear layer whose weights have 4 bits, two in a byte, between the least and the most of their group.

    It is made of another (:func:`pack`), and unpacks its weights where it multiplies: as exact as they are in
    the precision of the layer, and as fast as that but for reading them.
    """

    codes: Tensor
    low: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[rows, columns]``, unpacked."""
        halves = torch.cat([self.codes & 15, self.codes >> 4], dim=-1)
        return torch.addcmul(self.low, halves.to(self.scale.dtype), self.scale).flatten(1)


def pack(linear: nn.Linear) -> None:
    """Make a layer ``[rows, columns]``, its columns even, a :class:`Packed` one, in place."""
    weight = linear.weight.detach()
    groups = weight.float().unflatten(1, (-1, group_of(weight.shape[1])))
    low = groups.amin(-1, keepdim=True).to(weight.dtype)
    scale = ((groups.amax(-1, keepdim=True) - low.float()) / 15).to(weight.dtype)
    steps = scale.float().clamp(min=torch.finfo(torch.float32).tiny)  # a group of one value has none
    codes = groups.sub(low.float()).div_(steps).round_().clamp_(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    del linear._parameters["weight"]
    for name, tensor in (("codes", first | second << 4), ("low", low), ("scale", scale)):
        linear.register_buffer(name, tensor)
    linear.__class__ = Packed


def group_of(columns: int) -> int:
    """Weights of a row that share a scale, in 4 bits; the row's number of them is a multiple of it."""
    return math.gcd(columns, GROUP)


def quantizable(outline: Outline, part: str, net: Any) -> frozenset[str]:
    """Names of the linear layers that are stored in few bits: those of the blocks, of the net and of T5.

    What all tokens share, the modulations and the CLIPs keep theirs: they are small, or leave the device.
    """
    blocks = {
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        str(outline.t5): ("encoder.block.",),
    }.get(part, ())
    return frozenset(  # fmt: skip
        path
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % 2 == 0  # two weights a byte
        and blocks and path.startswith(blocks) and ".norm" not in path
    )
