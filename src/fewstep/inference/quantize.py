"""Fewer bits a weight (floor 3, torch).

On a GPU weights are unpacked here, where they meet thousands of tokens: torchao's kernels of few bits are
made for a few rows (on an H200 a picture took them six times as long as 16 bits).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.families.spec import ModelSpec

GROUP = 64
"""Weights of a row that share a scale, in 4 bits; fewer where a row's are no multiple."""


def check(bits: int, device: str) -> None:
    """Refuse bits that the device has no kernels for.

    Raises:
        UserError: it has none, there are no such bits, or torchao is not installed.
    """
    if bits not in (32, 16, 8, 4):
        raise UserError(f"bits must be 32, 16, 8 or 4, not {bits}")
    lack = unsupported(bits, device)
    if lack is not None:
        raise UserError(f"--bits {bits} needs {lack}")


def unsupported(bits: int, device: str) -> str | None:
    """What the device or this installation lacks for so few bits, if anything."""
    if bits >= 16 or device != "cpu":
        return None
    if bits == 4:
        return "a GPU; give --bits 8"
    if importlib.util.find_spec("torchao") is None:
        return f"torchao, which is not installed: {install('torchao')}"
    return None


def quantize(linear: nn.Linear, bits: int, device: str) -> None:
    """Quantize the weight of a layer in place: on a CPU by torchao, on a GPU by :func:`quantize_weight_only`.

    Args:
        linear: the layer, its weight on ``device``.
        bits: 8 or 4.
        device: ``cpu`` or ``cuda``.
    """
    if isinstance(linear, Int8Linear | Int4Linear):
        return  # by a reading that was broken off
    if device != "cpu":
        quantize_weight_only(linear, bits)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao: Any = importlib.import_module("torchao.quantization")
        ao.quantize_(linear, ao.Int8WeightOnlyConfig(version=2), filter_fn=_linear)


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def quantized_nbytes(rows: int, columns: int, bits: int, wide: int) -> int:
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


class Int8Linear(nn.Linear):
    """A linear layer with 8-bit weights and a scale per row, made by :func:`quantize_weight_only`."""

    codes: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[rows, columns]``, unpacked."""
        return self.codes.to(self.scale.dtype) * self.scale


class Int4Linear(nn.Linear):
    """The same in 4 bits, two weights in a byte, between the least and the most of their group."""

    codes: Tensor
    low: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[rows, columns]``, unpacked."""
        halves = torch.cat([self.codes & 15, self.codes >> 4], dim=-1)
        return torch.addcmul(self.low, halves.to(self.scale.dtype), self.scale).flatten(1)


def quantize_weight_only(linear: nn.Linear, bits: int) -> None:
    """Make a layer one of 8 or 4 bits, in place; of 4 where its columns are even.

    A product costs what it does in 16 bits and the unpacking of its weights, a few hundredths of that where
    there are thousands of tokens.
    """
    weight = linear.weight.detach()
    dtype, wide = weight.dtype, weight.float()
    least = torch.finfo(torch.float32).tiny  # a row of zeros, or a group of one value, has no scale
    if bits == 8:
        scale = (wide.abs().amax(-1, keepdim=True) / 127).to(dtype)
        codes = wide.div_(scale.float().clamp(min=least)).round_().clamp_(-127, 127).to(torch.int8)
        held = {"codes": codes, "scale": scale}
    else:
        groups = wide.unflatten(1, (-1, group_of(weight.shape[1])))
        low = groups.amin(-1, keepdim=True).to(dtype)
        scale = ((groups.amax(-1, keepdim=True) - low.float()) / 15).to(dtype)
        steps = groups.sub(low.float()).div_(scale.float().clamp(min=least))
        first, second = steps.round_().clamp_(0, 15).to(torch.uint8).chunk(2, dim=-1)
        held = {"codes": first | second << 4, "low": low, "scale": scale}
    del linear.weight
    for name, tensor in held.items():
        linear.register_buffer(name, tensor)
    linear.__class__ = Int8Linear if bits == 8 else Int4Linear


def group_of(columns: int) -> int:
    """Weights of a row that share a scale, in 4 bits; the row's number of them is a multiple of it."""
    return math.gcd(columns, GROUP)


def quantizable(outline: ModelSpec, part: str, net: Any) -> frozenset[str]:
    """Names of the linear layers that are stored in few bits: those of the blocks, of the net and of T5.

    What all tokens share, the modulations and the CLIPs keep theirs: they are small, or leave the device.
    """
    blocks = {
        "transformer": tuple(f"{name}." for name in outline.architecture.block_lists),
        str(outline.t5): ("encoder.block.",),
    }.get(part, ())
    return frozenset(
        path
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and blocks and path.startswith(blocks) and ".norm" not in path
        if layer.in_features % 2 == 0  # 4 bits lie two in a byte
    )
