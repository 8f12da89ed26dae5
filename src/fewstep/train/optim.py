"""Optimizers, the rate's way, and the norm of a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fewstep.modules.ema import local
from fewstep.train.distributed import total
from fewstep.train.run import TrainOptions


def adamw(net: Any, options: TrainOptions) -> Any:
    """AdamW; matrices have weight decay, vectors none."""
    import torch

    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)


def schedule(step: int, options: TrainOptions) -> float:
    """Share of the rate: up, level, down in a straight line to zero."""
    up = (step + 1) / max(1, options.warmup)
    down = (options.steps - step) / max(1.0, options.decay * options.steps)
    return min(1.0, up, down)


def clip(parameters: Iterable[Any], largest: float) -> float:
    """Scale gradients so that their norm over all of them, and over all processes' shards, is at most this.

    Returns:
        the norm before; where it is not finite nothing is scaled.
    """
    import torch

    shards: list[Any] = []
    wholes: list[Any] = []
    for p in parameters:
        if p.grad is not None:
            (shards if hasattr(p.grad, "full_tensor") else wholes).append(local(p.grad))
    norm = math.sqrt(_square(wholes) + (total(_square(shards)) if shards else 0.0))
    if math.isfinite(norm) and norm > largest:
        torch._foreach_mul_(shards + wholes, largest / norm)  # pyright: ignore[reportPrivateUsage]
    return norm


def _square(tensors: list[Any]) -> float:
    """Sum of squares."""
    import torch

    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateUsage]
    return float(torch.stack([n.double() for n in norms]).square().sum())
