"""A discriminator: light heads on features of the teacher or the proxy.

Features are tapped by forward hooks, never by copying a model's forward (LADD, Sauer et al., arXiv
2403.12015, taps the frozen teacher; SD3.5-Flash the proxy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.types import Cond, Velocity


@dataclass(frozen=True)
class FeatureTaps:
    """Features of some modules of a net while its velocity is called.

    Attributes:
        velocity: the net as a velocity.
        modules: where to tap, e.g. ``Family.blocks``. Of several outputs the last tensor is taken: in the
            double-stream blocks of SD3 and FLUX that is the picture's.
    """

    velocity: Velocity
    modules: Sequence[nn.Module]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """``x_t [B, C, H, W]``, ``t [B]`` -> a tensor ``[B, N, D]`` for every module, in its order."""
        kept: dict[int, Tensor] = {}

        def keep(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                kept[place] = _tokens(output)

            return hook

        hooks = [m.register_forward_hook(keep(i)) for i, m in enumerate(self.modules)]
        try:
            v = self.velocity(x_t, t, cond)
        finally:
            for hook in hooks:
                hook.remove()
        # A sharded net gathers what belongs to no block when its own output is passed back through: that
        # must be in the graph, although it is not used.
        return [kept[i] + 0 * v.mean() for i in range(len(self.modules))]


def _tokens(output: object) -> Tensor:
    tensors = output if isinstance(output, tuple | list) else [output]
    last = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)][-1].float()
    return last[:, None] if last.ndim == 2 else last


class _TokenHead(nn.Sequential):
    """A norm and two layers that judge every token separately: ``[B, N, D] -> [B, N]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def judge(self, tokens: Tensor, aspect: float) -> Tensor:
        return self(tokens).squeeze(-1)


class _ConvHead(nn.Sequential):
    """A norm and two convolutions over the grid of an image's tokens: ``[B, N, D] -> [B, N]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 3, padding=1),
        )

    def judge(self, tokens: Tensor, aspect: float) -> Tensor:
        batch, count, width = tokens.shape
        height = round((count / aspect) ** 0.5)
        if height < 1 or count % height:
            raise ValueError(f"{count} tokens are no grid of aspect {aspect:g}: take heads of tokens")
        # Contiguous: the backward pass of a convolution on a view of tokens crashes on CPUs (torch 2.13).
        grid = tokens.transpose(1, 2).reshape(batch, width, height, count // height).contiguous()
        return self(grid).flatten(1)


HEADS = {"token": _TokenHead, "conv": _ConvHead}
"""Kinds of heads by name. StyleGAN-T and LADD use convolutions."""


class DiscriminatorHeads(nn.Module):
    """One head per tapped block.

    Args:
        widths: features of each tap.
        hidden: width between the two layers of a head.
        seed: of the first weights.
        kind: ``token`` judges every token separately, ``conv`` the grid of an image's tokens.
        aspect: width over height of the images; for ``conv``.
    """

    def __init__(
        self, widths: Sequence[int], hidden: int = 64, seed: int = 0, kind: str = "token", aspect: float = 1.0
    ) -> None:
        super().__init__()
        self.aspect = aspect
        self.heads: Any = nn.ModuleList(HEADS[kind](width, hidden) for width in widths)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for index in range(len(widths)):
                self.reset_head(index, generator)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A tensor ``[B, N, D]`` for every head -> logits ``[B, sum of N]``; larger is more real."""
        # In half precision the judgements would be rounded by more than the regularisation is about.
        with torch.autocast(features[0].device.type, enabled=False):
            pairs = zip(self.heads, features, strict=True)
            return torch.cat([head.judge(x.float(), self.aspect) for head, x in pairs], 1)

    def reset_head(self, index: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Initialize one head again, in place, from a CPU generator, and return its parameters."""
        for layer in self.heads[index]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                inputs = layer.weight[0].numel()
                fresh = torch.randn(layer.weight.shape, generator=generator) * inputs**-0.5
                layer.weight.copy_(fresh)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
                layer.reset_parameters()
        return list(self.heads[index].parameters())
