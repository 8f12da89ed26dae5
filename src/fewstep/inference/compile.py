"""Parts compiled (floor 3, torch): blocks that are given their modulations, text encoders, decoders."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.modules.adaln import Slice
from fewstep.modules.block_transforms import compile_block


def compile_blocks(body: Any, backend: str = "inductor") -> None:
    """Compile the blocks of a net in place, without its modulations.

    A block takes its own piece of all modulations, so that blocks of one kind are one code, and sizes of its
    tensors are left open, so that pictures of other sizes are the same code too.
    """
    for block in (*body.transformer_blocks, *getattr(body, "single_transformer_blocks", ())):
        slices = [layer for layer in block.modules() if isinstance(layer, Slice)]
        first = min(piece.start for piece in slices)
        size = max(piece.start + piece.size for piece in slices) - first
        for piece in slices:
            piece.start -= first
        compile_block(block, backend, dynamic=True)
        block.forward = _Piece(block.forward, first, size)


def compile_encoder(encoder: Any, backend: str = "inductor") -> None:
    """Compile the layers of a CLIP or a T5, in place."""
    stack = getattr(encoder, "text_model", encoder).encoder
    for layer in stack.block if hasattr(stack, "block") else stack.layers:
        compile_block(layer, backend)


def compile_decoder(vae: Any, backend: str = "inductor") -> None:
    """Compile the decoder of an autoencoder, in place: norms and what follows them in one pass, and in the
    layout that a GPU convolves in."""
    warnings.filterwarnings("ignore", message="(?s).*functools.lru_cache", module="torch._dynamo")
    for norm in vae.decoder.modules():
        if type(norm) is nn.GroupNorm:
            norm.__class__ = ChannelsLastGroupNorm
    compile_block(vae.decoder, backend)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """The same norm, its sums taken by channel and then by group: in ``channels_last`` a group's numbers lie
    scattered, a few bytes here and there, and a channel's beside all others'."""

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, ...]`` -> the same shape; sums are float32."""
        x = input.float()
        places = tuple(range(2, x.ndim))
        mean, square = (
            sums.unflatten(1, (self.num_groups, -1)).mean(-1, keepdim=True)
            for sums in (x.mean(places), x.square().mean(places))
        )
        narrow = (square - mean * mean).clamp(min=0).add(self.eps).rsqrt()
        scale = (self.weight.float().unflatten(0, (self.num_groups, -1)) * narrow).flatten(1)
        shift = self.bias.float() - (mean * scale.unflatten(1, (self.num_groups, -1))).flatten(1)
        shape = (*scale.shape, *[1] * len(places))
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


@dataclass(frozen=True)
class _Piece:
    """A block's forward pass, which is handed its part of ``temb [B, M]``."""

    forward: Any
    start: int
    size: int

    def __call__(self, *args: Any, temb: Any, **kwargs: Any) -> Any:
        return self.forward(*args, temb=temb.narrow(-1, self.start, self.size).contiguous(), **kwargs)
