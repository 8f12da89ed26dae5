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


class DiscriminatorHeads(nn.Module):
    """One head per tapped block. A norm and two layers judge every token separately.

    Args:
        widths: features of each tap.
        hidden: width between the two layers.
        seed: of the first weights.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.heads: Any = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for width in widths
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for index in range(len(widths)):
                self.reset_head(index, generator)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A tensor ``[B, N, D]`` for every head -> logits ``[B, sum of N]``; larger is more real."""
        # In half precision the judgements would be rounded by more than the regularisation is about.
        with torch.autocast(features[0].device.type, enabled=False):
            judged = [head(x.float()).squeeze(-1) for head, x in zip(self.heads, features, strict=True)]
            return torch.cat(judged, 1)

    def reset_head(self, index: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Initialize one head again, in place, from a CPU generator, and return its parameters."""
        for layer in self.heads[index]:
            if isinstance(layer, nn.Linear):
                fresh = torch.randn(layer.weight.shape, generator=generator) * layer.in_features**-0.5
                layer.weight.copy_(fresh)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
        return list(self.heads[index].parameters())
