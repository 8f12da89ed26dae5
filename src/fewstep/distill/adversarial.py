"""Discriminator heads for a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Velocity
from fewstep.core.validate import require_positive
from fewstep.distill.context import DistillContext

if TYPE_CHECKING:
    from torch.nn import Module

    from fewstep.methods.ladd import AdversarialLoss
    from fewstep.modules.discriminator import HeadKind

NUM_TAPS = 3
"""Blocks whose features the heads read: evenly spaced, the last one among them."""


def adversarial_loss(
    context: DistillContext,
    velocity: Velocity,
    blocks: Sequence[Module],
    *,
    heads: HeadKind = "token",
    num_taps: int = NUM_TAPS,
    **options: Any,
) -> AdversarialLoss:
    """Return the adversarial loss with new heads on some blocks of a net.

    Args:
        context: the distillation; its first sample gives the width of the features.
        velocity: the net as a velocity.
        blocks: its blocks.
        heads: kind of the heads.
        num_taps: blocks that the heads read; all of them where there are fewer.
        options: of :class:`~fewstep.methods.ladd.AdversarialLoss`.

    Raises:
        UserError: there is no block to read, or the tokens are no grid for convolutional heads.
    """
    import torch

    from fewstep.methods.ladd import AdversarialLoss
    from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

    require_positive(num_taps=num_taps)
    taps = FeatureTaps(velocity, spaced(blocks, num_taps))
    row = context.samples.read([0])
    teacher, seed = context.teacher, context.config.seed
    device = teacher.net.device
    with torch.no_grad():
        t = torch.full((1,), 0.5, device=device)
        features = taps(row.latents.to(device), t, row.cond.map(lambda array: array.to(device)))
        widths = [feature.shape[-1] for feature in features]
        patch = teacher.architecture.patch(teacher.net.config)
        made = DiscriminatorHeads(widths, seed=seed, kind=heads, patch=patch).to(device)
        made(features, row.latents.shape[2:])  # refuses tokens that are no grid
    return AdversarialLoss(taps, made, **options)


def spaced(blocks: Sequence[Module], count: int) -> list[Module]:
    """Return ``count`` of the blocks, or all, evenly spaced, the last one among them."""
    count = min(count, len(blocks))
    return [blocks[round((i + 1) * len(blocks) / count) - 1] for i in range(count)]
