"""Norms whose squares stay within float16.

Float16 ends at 65504, so the plain mean of squares overflows where a number is beyond 256. Here what is
squared is first divided by a quarter of the group's peak, and multiplied by nothing later: a norm forgets the
scale of what it norms. In exact arithmetic they are the plain norms. Engines that compute in float16 through
and through, such as the Neural Engine, need them.

This file imports torch when it is imported; only the exporters import it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.modules.adaln import with_submodules

TOP = 4.0
"""The peak after the division: what is a thousandth of the peak has a square of 1.6e-5, which float16 holds
to 0.4 %."""

FLOOR = 2.0**-8
"""The least divisor: the norm's epsilon, divided by its square, stays in the range too."""


class HalfRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)``, times the weight, over the last axis."""

    root: Tensor  # a constant by itself: from a number, coremltools makes 1 / (scale + 1e-4)

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.register_buffer("root", torch.tensor([norm.eps**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` -> ``[..., C]``."""
        scale = _scale(x, (-1,))
        x = x / scale
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.root / scale).square())
        return x if self.weight is None else x * self.weight


class HalfGroupNorm(nn.Module):
    """``nn.GroupNorm``; means are taken along one axis and then the other, so that no sum is long."""

    root: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups = norm.num_groups
        self.register_buffer("root", torch.tensor([norm.eps**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ..., W]`` -> the same."""
        grouped = x.reshape(x.shape[0], self.groups, -1, x.shape[-1])
        scale = _scale(grouped, (2, 3))
        grouped = grouped / scale
        centred = grouped - _mean(grouped)
        normed = centred * torch.rsqrt(_mean(centred.square()) + (self.root / scale).square())
        rows = (-1, *[1] * (x.ndim - 2))
        return normed.reshape(x.shape) * self.weight.reshape(rows) + self.bias.reshape(rows)


def with_fp16_norms(module: Any) -> Any:
    """``module`` with these norms instead of its own; all else is shared, and ``module`` stays as it is."""
    from diffusers.models.normalization import RMSNorm

    instead: dict[str, Any] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, RMSNorm):
            instead[name] = HalfRMSNorm(norm)
        elif isinstance(norm, nn.GroupNorm):
            instead[name] = HalfGroupNorm(norm)
    return with_submodules(module, instead)


def _scale(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (x.abs().amax(axes, keepdim=True) / TOP).clamp_min(FLOOR)


def _mean(x: Tensor) -> Tensor:
    return x.mean(3, keepdim=True).mean(2, keepdim=True)
