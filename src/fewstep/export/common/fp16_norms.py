"""Norms whose squares do not overflow in float16.

Float16 ends at 65504, so a mean of squares overflows if an activation exceeds 256. These norms first divide
their input by a quarter of its peak. In exact arithmetic the result is the same, because a norm does not
depend on the scale of its input. Engines that compute in float16 only, such as the Neural Engine, need them.

This module imports torch at import time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fewstep.modules.adaln import with_submodules

if TYPE_CHECKING:
    from diffusers.models.normalization import RMSNorm

TOP = 4.0
"""The peak after the division. A thousandth of the peak has a square of 1.6e-5, which float16 holds to
0.4 %."""

FLOOR = 2.0**-8
"""The smallest divisor. The norm's epsilon, divided by its square, stays in the range of float16."""


class HalfRMSNorm(nn.Module):
    """RMS norm over the last axis: ``x / sqrt(mean(x^2) + eps)``, times the weight."""

    root: Tensor  # a tensor: of a Python number, coremltools makes 1 / (scale + 1e-4)

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight: Tensor | None = norm.weight
        self.register_buffer("root", torch.tensor([norm.eps**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., C]``; the shape stays."""
        scale = _scale(x, (-1,))
        x = x / scale
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.root / scale).square())
        return x if self.weight is None else x * self.weight


class HalfGroupNorm(nn.Module):
    """``nn.GroupNorm`` with means along one axis and then the other, which keeps sums short."""

    root: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups = norm.num_groups
        self.register_buffer("root", torch.tensor([norm.eps**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[B, C, ..., W]``; the shape stays."""
        grouped = x.reshape(x.shape[0], self.groups, -1, x.shape[-1])
        scale = _scale(grouped, (2, 3))
        grouped = grouped / scale
        centred = grouped - _mean(grouped)
        normed = centred * torch.rsqrt(_mean(centred.square()) + (self.root / scale).square())
        rows = (-1, *[1] * (x.ndim - 2))
        return normed.reshape(x.shape) * self.weight.reshape(rows) + self.bias.reshape(rows)


def with_fp16_norms(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` with these norms. Other submodules are shared; ``module`` is unchanged."""
    from diffusers.models.normalization import RMSNorm

    replacements: dict[str, nn.Module] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, RMSNorm):
            replacements[name] = HalfRMSNorm(norm)
        elif isinstance(norm, nn.GroupNorm):
            replacements[name] = HalfGroupNorm(norm)
    return with_submodules(module, replacements)


def _scale(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (x.abs().amax(axes, keepdim=True) / TOP).clamp_min(FLOOR)


def _mean(x: Tensor) -> Tensor:
    return x.mean(3, keepdim=True).mean(2, keepdim=True)
