"""``fewstep distill dmd``."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fewstep.core.types import Sampler, UserError
from fewstep.distill.adversarial import adversarial_loss
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.matching import DEFAULT_MATCHING, MatchingConfig, matching_loss
from fewstep.distill.setup import build_context, build_run
from fewstep.train.run import Run


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    score_point: Literal["shared", "shared-free", "renoise"] = "renoise",
    proxy_target: Literal["finals", "estimates", "path"] = "estimates",
    matching: MatchingConfig = DEFAULT_MATCHING,
    sampler: Sampler = "euler",
    gan_weight: float = 0.0,
    disc_input: Literal["estimates", "finals", "last"] = "estimates",
    heads_weight: float = 0.01,
    heads_lr: float = 1e-3,
    trajectory_weight: float = 0.0,
) -> Run:
    """Distribution matching. --sampler renoise --fresh-rollouts --gan-weight 0.005 make it DMD2 as published.

    Args:
        config: Shared.
        score_point: Where the scores are compared: on the renoised estimate, or on the student's trajectory.
        proxy_target: What the proxy models: the student's samples, its estimates at a random step, or its
            trajectory where the scores are compared.
        matching: Shared.
        sampler: How the student is sampled: along its velocity, or with fresh noise after each step.
        gan_weight: Weight of the adversarial loss on features of the proxy; 0 leaves it out.
        disc_input: What the heads see: an estimate at a random step, or samples with the gradient of all
            steps or of the last.
        heads_weight: Weight of the heads' loss in the training of the proxy, where there are heads.
        heads_lr: Learning rate of the heads, where there are some.
        trajectory_weight: Weight of trajectory guidance beside matching.
    """
    from fewstep.methods.dmd import DMD
    from fewstep.methods.flash import Flash

    check_options(config, heads_lr=heads_lr, gan_weight=gan_weight, trajectory_weight=trajectory_weight)
    matching.check(config, score_point)
    if sampler == "renoise" and (score_point != "renoise" or proxy_target == "path"):
        raise UserError("--sampler renoise has no trajectory to share: give --score-point renoise, not path")
    context = build_context(config, "dmd", trajectories=trajectory_weight > 0)
    context = replace(context, sampler=sampler)
    proxy, student = context.trainable("proxy"), context.student
    loss = matching_loss(context, proxy.velocity, score_point, proxy_target, matching)
    net_lrs = {"proxy": matching.proxy_lr or config.lr}
    if not gan_weight:
        method = DMD(
            student.net,
            student.velocity,
            proxy.net,
            loss,
            context.grid,
            matching.proxy_updates,
            matching.ida_decay,
            matching.fresh_rollouts,
            sampler,
            trajectory_weight,
        )
        return build_run(context, method, proxy, net_lrs=net_lrs)
    flash = Flash(
        student.net,
        student.velocity,
        proxy.net,
        loss,
        adversarial_loss(context, proxy.velocity, proxy.blocks, disc_input=disc_input, weight=gan_weight),
        context.grid,
        matching.proxy_updates,
        matching.ida_decay,
        trajectory_weight,
        matching.fresh_rollouts,
        sampler,
        heads_weight,
    )
    return build_run(context, flash, proxy, net_lrs=net_lrs | {"heads": heads_lr})
