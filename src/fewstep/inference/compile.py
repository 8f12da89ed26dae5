"""Compilation of a model's parts: net blocks with given modulations, text encoders and decoders."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.modules.adaln import Slice
from fewstep.modules.block_transforms import compile_block


def compile_blocks(body: Any, backend: str = "inductor") -> None:
    """Compile the blocks of a net without its modulation layers, in place.

    Each block gets its own slice of the modulations, so that all blocks of a kind share their code. Tensor
    sizes are dynamic, so that images of other sizes share it, too.
    """
    for block in (*body.transformer_blocks, *getattr(body, "single_transformer_blocks", ())):
        slices = [layer for layer in block.modules() if isinstance(layer, Slice)]
        start = min(layer.start for layer in slices)
        size = max(layer.start + layer.size for layer in slices) - start
        for layer in slices:
            layer.start -= start
        compile_block(block, backend, dynamic=True)
        block.forward = _SlicedModulation(block.forward, start, size)


def compile_encoder(encoder: Any, backend: str = "inductor") -> None:
    """Compile the layers of a CLIP or T5 encoder in place."""
    stack = getattr(encoder, "text_model", encoder).encoder
    for layer in stack.block if hasattr(stack, "block") else stack.layers:
        compile_block(layer, backend)


def compile_decoder(vae: Any, backend: str = "inductor") -> None:
    """Compile the decoder of an autoencoder in place.

    Norms and the operators after them are fused, in the ``channels_last`` layout.
    """
    warnings.filterwarnings("ignore", message="(?s).*functools.lru_cache", module="torch._dynamo")
    for norm in vae.decoder.modules():
        if type(norm) is nn.GroupNorm:
            norm.__class__ = ChannelsLastGroupNorm
    compile_block(vae.decoder, backend)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A group norm that sums over channels first and then over groups.

    In ``channels_last``, sums over a channel read memory in order, while sums over a group read scattered
    bytes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[B, C, ...]`` with float32 sums; the shape stays."""
        x = input.float()
        axes = tuple(range(2, x.ndim))
        mean, square = (
            sums.unflatten(1, (self.num_groups, -1)).mean(-1, keepdim=True)
            for sums in (x.mean(axes), x.square().mean(axes))
        )
        inverse_std = (square - mean * mean).clamp(min=0).add(self.eps).rsqrt()
        scale = (self.weight.float().unflatten(0, (self.num_groups, -1)) * inverse_std).flatten(1)
        shift = self.bias.float() - (mean * scale.unflatten(1, (self.num_groups, -1))).flatten(1)
        shape = (*scale.shape, *[1] * len(axes))
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


@dataclass(frozen=True)
class _SlicedModulation:
    """A block's forward pass with its slice of ``temb [B, M]``."""

    forward: Callable[..., object]
    start: int
    size: int

    def __call__(self, *args: object, temb: Tensor, **kwargs: object) -> object:
        return self.forward(*args, temb=temb.narrow(-1, self.start, self.size).contiguous(), **kwargs)
