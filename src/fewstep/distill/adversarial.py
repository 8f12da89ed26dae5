"""Discriminator heads for a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fewstep.core.types import UserError, Velocity
from fewstep.distill.context import DistillContext

if TYPE_CHECKING:
    from torch.nn import Module

    from fewstep.methods.ladd import AdversarialLoss

NUM_TAPS = 3
"""Blocks whose features the heads read: evenly spaced, the last one among them."""


def adversarial_loss(
    context: DistillContext,
    velocity: Velocity,
    blocks: Sequence[Module],
    *,
    heads: Literal["token", "conv"] = "token",
    **options: Any,
) -> AdversarialLoss:
    """Return the adversarial loss with new heads on some blocks of a net.

    Args:
        context: the distillation; its first sample gives the width of the features.
        velocity: the net as a velocity.
        blocks: its blocks.
        heads: kind of the heads.
        options: of :class:`~fewstep.methods.ladd.AdversarialLoss`.

    Raises:
        UserError: heads over a grid, where the features are of no grid.
    """
    import torch

    from fewstep.methods.ladd import AdversarialLoss
    from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

    taps = FeatureTaps(velocity, spaced(blocks, NUM_TAPS))
    row = context.samples.read([0])
    device = context.teacher.net.device
    with torch.no_grad():
        t = torch.full((1,), 0.5, device=device)
        features = taps(row.latents.to(device), t, row.cond.map(lambda array: array.to(device)))
    widths = [feature.shape[-1] for feature in features]
    _, height, width = context.teacher.latent
    net = DiscriminatorHeads(widths, seed=context.config.seed, kind=heads, aspect=width / height).to(device)
    try:
        net(features)
    except ValueError as error:
        raise UserError(f"--heads {heads}: {error}") from None
    return AdversarialLoss(taps, net, **options)


def spaced(blocks: Sequence[Module], count: int) -> list[Module]:
    """Return ``count`` of the blocks, evenly spaced, the last one among them."""
    return [blocks[round((i + 1) * len(blocks) / count) - 1] for i in range(min(count, len(blocks)))]
