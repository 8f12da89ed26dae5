"""The noise of the distribution matching gradient, by where the scores are compared, along a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core import atomic
from fewstep.core.validate import require_at_least, require_positive
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.context import DistillContext
from fewstep.distill.setup import build_context, build_run
from fewstep.methods.base import Losses
from fewstep.methods.dmd import DistributionMatching, ScorePoint
from fewstep.methods.rollout import Rollout

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

    from fewstep.train.train_step import State

SCORE_POINTS: tuple[ScorePoint, ...] = ("shared", "shared-free", "renoise")
FILE = "noise.json"

FRESH = 10**6
"""Batches from this step on belong to the measurement alone: no training has so many steps."""


def gradient_noise_fraction(net: Module, losses: Callable[[int], Losses], draws: int) -> float:
    """Return the share of noise in a gradient: the trace of its covariance over its mean squared norm.

    It lies between 0, where every batch gives the same gradient, and 1, where the mean gradient is zero. It
    is unbiased up to the quotient.

    Args:
        net: whose parameters the gradient is of.
        losses: index of a draw to its losses, each of a batch and noise of its own.
        draws: number of draws, at least 2.
    """
    import torch

    parameters = [p for p in net.parameters() if p.requires_grad]
    total, squares = [torch.zeros_like(p) for p in parameters], 0.0
    for number in range(draws):
        loss = _trained_loss(losses(number))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for accumulated, gradient in zip(total, gradients, strict=True):
            if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]
                accumulated += gradient
                squares += float(gradient.square().sum()) / draws
    mean = sum(float(gradient.square().sum()) for gradient in total) / draws**2
    return (squares - mean) * draws / (draws - 1) / squares if squares else float("nan")


def _trained_loss(losses: Losses) -> torch.Tensor:
    trained = [value for value in losses.values() if value.requires_grad]
    return sum(trained[1:], start=trained[0])


def gradient_noise(
    *, config: DistillConfig = DEFAULT, proxy_updates: int = 5, every: int = 0, draws: int = 8
) -> None:
    """Measure how noisy the gradient of distribution matching is, along a training.

    A student is trained by matching on renoised estimates. Before, during and after it, the gradient of
    `draws` batches is taken for each place where scores can be compared. Writes `noise.json`: of every
    measurement the training step and the share of noise by place, from 0 (all batches agree) to 1.

    Args:
        config: Shared.
        proxy_updates: Updates of the proxy per update of the student.
        every: Training steps between two measurements; 0 measures before, halfway and after.
        draws: Gradients per measurement.
    """
    require_positive(proxy_updates=proxy_updates, steps=config.steps)
    require_at_least(0, every=every)
    require_at_least(2, draws=draws)
    every = every or max(1, config.steps // 2)
    measured = [
        {"step": step, **fractions}
        for step, fractions in _along_training(config, proxy_updates, every, draws)
    ]
    path = (config.output or Path("runs/gradient-noise")) / FILE
    record = {"batch": config.batch_size, "measured": measured}
    atomic.write(path, (json.dumps(record, indent=1) + "\n").encode())
    print(path)


def _along_training(
    config: DistillConfig, proxy_updates: int, every: int, draws: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the training step and the share of noise of every score point, each time it is measured."""
    from fewstep.methods.dmd import DMD
    from fewstep.train.train_step import State

    context = build_context(config, "gradient-noise")
    proxy, student = context.trainable("proxy"), context.student
    matching = DistributionMatching(context.guided_teacher, proxy.velocity, "renoise")
    method = DMD(student.net, student.velocity, proxy.net, matching, context.grid, proxy_updates)
    state = State(build_run(context, method, proxy))
    for step in sorted({*range(0, config.steps, every), config.steps}):
        while state.step < step:
            state.train_step()
        fractions = {
            point: _measure(context, state, replace(matching, score_point=point), draws)
            for point in SCORE_POINTS
        }
        print(f"step {step}: " + ", ".join(f"{point} {share:.2f}" for point, share in fractions.items()))
        yield step, fractions


def _measure(context: DistillContext, state: State, matching: DistributionMatching, draws: int) -> float:
    """Return the share of noise in the student's gradient."""
    import torch

    from fewstep.core.types import WHOLE
    from fewstep.train.device import attention, to_device, use_bf16
    from fewstep.train.train_step import draw

    options, batches, student = state.run.options, state.run.batches, context.student
    for net in state.nets.values():
        net.requires_grad_(net is student.net)

    def losses(number: int) -> Losses:
        batch = to_device(batches(FRESH + number, WHOLE), state.device)
        rollout = Rollout(student.velocity, context.grid)
        random = draw(options.seed, FRESH, number)
        half = use_bf16(options.precision, state.device)
        with (
            torch.autocast(state.device, torch.bfloat16, enabled=half),
            attention(state.device, options.tokens),
        ):
            return {"matching": matching.student_loss(rollout, batch, random)["matching"]}

    return gradient_noise_fraction(student.net, losses, draws)
