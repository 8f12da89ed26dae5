"""Weight-only quantization of linear layers to 8 and 4 bits.

On a CPU torchao quantizes. On a GPU the layers here unpack their weights before each product. torchao's GPU
kernels are made for few rows: with thousands of tokens, an image takes six times as long as in 16 bits
(H200).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings

import torch
from torch import Tensor, nn

from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.families.spec import ModelSpec

GROUP = 64
"""Largest number of 4-bit weights that share a scale."""


def check(bits: int, device: str) -> None:
    """Check that the device supports this many bits per weight.

    Raises:
        UserError: it does not, the number is unknown, or torchao is not installed.
    """
    if bits not in (32, 16, 8, 4):
        raise UserError(f"bits must be 32, 16, 8 or 4, not {bits}")
    missing = unsupported(bits, device)
    if missing is not None:
        raise UserError(f"--bits {bits} needs {missing}")


def unsupported(bits: int, device: str) -> str | None:
    """Return what the device or installation lacks for this many bits per weight; ``None`` if nothing."""
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
        return  # an interrupted load already quantized it
    if device != "cpu":
        quantize_weight_only(linear, bits)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = importlib.import_module("torchao.quantization")
        ao.quantize_(linear, ao.Int8WeightOnlyConfig(version=2), filter_fn=_linear)


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def quantized_nbytes(rows: int, columns: int, bits: int, wide: int) -> int:
    """Return the size of a weight ``[rows, columns]`` in bytes.

    Args:
        rows: output features.
        columns: input features.
        bits: bits per weight: 32, 16, 8 or 4.
        wide: bytes per number of the net's arithmetic.
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
        """The unpacked weight ``[rows, columns]``."""
        return self.codes.to(self.scale.dtype) * self.scale


class Int4Linear(nn.Linear):
    """A linear layer with 4-bit weights, two per byte, scaled between minimum and maximum of a group."""

    codes: Tensor
    low: Tensor
    scale: Tensor

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unpacked weight ``[rows, columns]``."""
        halves = torch.cat([self.codes & 15, self.codes >> 4], dim=-1)
        return torch.addcmul(self.low, halves.to(self.scale.dtype), self.scale).flatten(1)


def quantize_weight_only(linear: nn.Linear, bits: int) -> None:
    """Quantize a layer to 8 or 4 bits in place. 4 bits need an even number of columns.

    Unpacking costs a few per cent of a product with thousands of tokens.
    """
    weight = linear.weight.detach()
    dtype, wide = weight.dtype, weight.float()
    least = torch.finfo(torch.float32).tiny  # for a row of zeros or a group of equal values
    if bits == 8:
        scale = (wide.abs().amax(-1, keepdim=True) / 127).to(dtype)
        codes = wide.div_(scale.float().clamp(min=least)).round_().clamp_(-127, 127).to(torch.int8)
        buffers = {"codes": codes, "scale": scale}
    else:
        groups = wide.unflatten(1, (-1, group_of(weight.shape[1])))
        low = groups.amin(-1, keepdim=True).to(dtype)
        scale = ((groups.amax(-1, keepdim=True) - low.float()) / 15).to(dtype)
        steps = groups.sub(low.float()).div_(scale.float().clamp(min=least))
        first, second = steps.round_().clamp_(0, 15).to(torch.uint8).chunk(2, dim=-1)
        buffers = {"codes": first | second << 4, "low": low, "scale": scale}
    del linear.weight
    for name, tensor in buffers.items():
        linear.register_buffer(name, tensor)
    linear.__class__ = Int8Linear if bits == 8 else Int4Linear


def group_of(columns: int) -> int:
    """Return the number of 4-bit weights that share a scale, which divides the row length."""
    return math.gcd(columns, GROUP)


def quantizable(spec: ModelSpec, part: str, net: nn.Module) -> frozenset[str]:
    """Return the names of the linear layers to quantize: those of the blocks of the net and of T5.

    Other layers, the modulations and the CLIPs keep their precision. They are small, or are offloaded.
    """
    blocks = {
        "transformer": tuple(f"{name}." for name in spec.architecture.block_lists),
        str(spec.t5): ("encoder.block.",),
    }.get(part, ())
    return frozenset(
        path
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and blocks and path.startswith(blocks) and ".norm" not in path
        if layer.in_features % 2 == 0  # a byte holds two 4-bit weights
    )
