"""Fewer bits a weight, by torchao (floor 3, torch)."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

from fewstep.staged.outline import Outline
from fewstep.types import UserError

GROUP = 64
"""Weights of a row that share a scale, in 4 bits."""

TILE_IN, TILE_OUT = 1024, 8
"""What torchao's 4-bit layout (``tile_packed_to_4d``) fills a matrix up to."""


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
    if importlib.util.find_spec("torchao") is None:
        return "torchao, which is not installed: pip install 'fewstep[torchao]'"
    if bits == 4 and device == "cpu":
        return "a GPU: torchao has no 4-bit kernel for this CPU; give --bits 8"
    if bits == 4 and torch.cuda.get_device_capability()[0] < 8:
        return "a GPU of compute capability 8.0 or later; give --bits 8"
    return None


def quantize(linear: nn.Linear, bits: int, device: str) -> None:
    """Store the weight of a layer in so few bits, in place.

    On a GPU 8 bits multiply 8-bit activations, with a scale a token, so that a picture does not depend on
    its batch. On a CPU the weights alone have 8 bits: its products of two integers are the slower ones.

    Args:
        linear: the layer, its weight on ``device``.
        bits: 8 or 4.
        device: ``cpu`` or ``cuda``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao: Any = importlib.import_module("torchao.quantization")
        if bits == 4:
            packing: Any = "tile_packed_to_4d"
            config: Any = ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packing)
        elif device == "cpu":
            config = ao.Int8WeightOnlyConfig(version=2)
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
    rows, columns = -(-rows // TILE_OUT) * TILE_OUT, -(-columns // TILE_IN) * TILE_IN
    return rows * columns // 2 + rows * (columns // GROUP) * 2 * wide


def quantizable(outline: Outline, part: str, net: Any) -> frozenset[str]:
    """Names of the linear layers that are stored in few bits: those of the blocks, of the net and of T5.

    What all tokens share, the modulations and the CLIPs keep theirs: they are small, or leave the device.
    """
    blocks = {
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        str(outline.t5): ("encoder.block.",),
    }.get(part, ())
    return frozenset(
        path
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and blocks and path.startswith(blocks) and ".norm" not in path
    )
