"""The optimizer, the learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fewstep.modules.ema import local
from fewstep.train.distributed import total
from fewstep.train.run import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import AdamW


def adamw(net: Module, options: TrainOptions) -> AdamW:
    """Return AdamW with weight decay for matrices and none for vectors."""
    import torch

    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)


def schedule(step: int, options: TrainOptions) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, linear decay to zero.

    Args:
        step: from 0.
        options: the number of steps, and which shares of them are warm-up and decay.
    """
    rising = (step + 1) / max(1.0, options.warmup * options.steps)
    falling = (options.steps - step) / max(1.0, options.decay * options.steps)
    return min(1.0, rising, falling)


def clip(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale gradients to a norm of at most ``max_norm``, over all parameters and all processes' shards.

    Returns:
        the norm before; if it is not finite, nothing is scaled.
    """
    import torch

    shards: list[Tensor] = []
    replicated: list[Tensor] = []
    for p in parameters:
        if p.grad is not None:
            (shards if hasattr(p.grad, "full_tensor") else replicated).append(local(p.grad))
    norm = math.sqrt(_squared_norm(replicated) + (total(_squared_norm(shards)) if shards else 0.0))
    if math.isfinite(norm) and norm > max_norm:
        torch._foreach_mul_(shards + replicated, max_norm / norm)  # pyright: ignore[reportPrivateUsage]
    return norm


def _squared_norm(tensors: list[Tensor]) -> float:
    import torch

    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateUsage]
    return float(torch.stack([n.double() for n in norms]).square().sum())
