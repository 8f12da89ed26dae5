"""A discriminator: light heads on features of the teacher or the proxy.

Features are tapped by forward hooks, never by copying a model's forward (LADD, Sauer et al., arXiv
2403.12015, taps the frozen teacher; SD3.5-Flash the proxy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.core.types import Cond, UserError, Velocity


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


HeadKind = Literal["token", "conv"]
"""Kinds of heads: ``token`` judges every token by itself, ``conv`` every token with its eight neighbours."""


class TokenHead(nn.Sequential):
    """A norm and two layers judge every token separately: ``[B, N, D]`` -> ``[B, N]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1), nn.Flatten(1)
        )


class ConvHead(nn.Module):
    """Two convolutions over the image's tokens judge every place: ``[B, N, D]`` -> ``[B, h w]``.

    A light version of the heads of StyleGAN-T (Sauer et al., arXiv 2301.09515, section 3.2), which LADD uses:
    without their residual block and without conditions.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, 1, 1), nn.Flatten(1)
        )

    def forward(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        # Contiguous: the backward pass of a convolution on a view of tokens can crash on CPUs (torch 2.13).
        grid = self.norm(tokens).transpose(1, 2).contiguous().unflatten(2, (rows, columns))
        return self.layers(grid)


class DiscriminatorHeads(nn.Module):
    """One head per tapped block.

    Args:
        widths: features of each tap.
        hidden: width between the two layers.
        seed: of the first weights.
        kind: of the heads.
        patch: latent cells along a side of a token, which ``conv`` needs.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden: int = 64,
        seed: int = 0,
        kind: HeadKind = "token",
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.patch = kind, patch
        make = TokenHead if kind == "token" else ConvHead
        self.heads: Any = nn.ModuleList(make(width, hidden) for width in widths)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for index in range(len(widths)):
                self.reset_head(index, generator)

    def forward(self, features: Sequence[Tensor], size: Sequence[int] = ()) -> Tensor:
        """Return the logits, ``[B, sum of the heads' places]``; larger is more real.

        Args:
            features: a tensor ``[B, N, D]`` for every head.
            size: height and width of the latents, which ``conv`` needs.

        Raises:
            UserError: ``conv``, and the tokens are fewer than the latents' patches.
        """
        # In half precision the judgements would be rounded by more than the regularisation is about.
        with torch.autocast(features[0].device.type, enabled=False):
            pairs = zip(self.heads, features, strict=True)
            return torch.cat([self._judge(head, tokens.float(), size) for head, tokens in pairs], 1)

    def _judge(self, head: nn.Module, tokens: Tensor, size: Sequence[int]) -> Tensor:
        if self.kind == "token":
            return head(tokens)
        sides = [side // self.patch for side in size]
        whole = len(sides) == 2 and all(side % self.patch == 0 for side in size)
        if not whole or tokens.shape[1] < sides[0] * sides[1]:
            shape = " x ".join(map(str, size)) or "no image"
            raise UserError(
                f"{tokens.shape[1]} tokens are no grid of patches of {self.patch} for latents of {shape}: "
                "give --heads token"
            )
        # Where a block returns text and image together, as FLUX's single-stream blocks do inside, the image
        # comes last.
        return head(tokens[:, -sides[0] * sides[1] :], *sides)

    def reset_head(self, index: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Initialize one head again, in place, from a CPU generator, and return its parameters."""
        for layer in self.heads[index].modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                fresh = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(fresh * layer.weight[0].numel() ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
        return list(self.heads[index].parameters())
