"""How noisy the gradient of distribution matching is, by where the scores are taken, along a training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import atomic
from fewstep.core.validate import require_at_least, require_positive
from fewstep.distill.context import DistillConfig, DistillContext
from fewstep.methods.base import Losses
from fewstep.methods.dmd import DistributionMatching, Where
from fewstep.methods.rollout import Rollout

if TYPE_CHECKING:
    from fewstep.train.train_step import State

PLACES: tuple[Where, ...] = ("shared", "shared-free", "renoise")
NOTE = "noise.json"
ONE = DistillConfig()
"""The settings that nobody changed."""

FRESH = 10**6
"""Batches from here on are the measurement's own: no training comes so far."""


def gradient_noise_fraction(net: Any, losses: Callable[[int], Losses], draws: int) -> float:
    """Share of noise in a gradient: the trace of its covariance over its mean squared norm, 0 to 1.

    At 0 every batch pulls the same way, at 1 the mean of the gradient is lost in it. Unbiased but for the
    quotient.

    Args:
        net: whose parameters the gradient is of.
        losses: number of a draw -> its losses, each of a batch and noise of its own.
        draws: how many, at least 2.
    """
    import torch

    parameters = [p for p in net.parameters() if p.requires_grad]
    total, squares = [torch.zeros_like(p) for p in parameters], 0.0
    for number in range(draws):
        loss: Any = sum(value for value in losses(number).values() if value.requires_grad)
        gradient: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
        for kept, new in zip(total, gradient, strict=True):
            if new is not None:
                kept += new
                squares += float(new.square().sum()) / draws
    mean = float(sum(kept.square().sum() for kept in total)) / draws**2
    return (squares - mean) * draws / (draws - 1) / squares if squares else float("nan")


def gradient_noise(
    *, config: DistillConfig = ONE, proxy_updates: int = 5, every: int = 0, draws: int = 8
) -> None:
    """Measure how noisy the gradient of distribution matching is, along a training.

    A student is trained by matching on renoised estimates; before, in between and after, the gradient of
    `draws` batches is taken wherever its scores can be. Writes `noise.json`: of every measurement the updates
    until then and the share of noise by place, from 0 (every batch pulls the same way) to 1.

    Args:
        config: Shared.
        proxy_updates: Updates of the proxy for each of the student's.
        every: Updates between two measurements; 0 measures before, halfway and after.
        draws: Gradients a measurement.
    """
    require_positive(proxy_updates=proxy_updates, steps=config.steps)
    require_at_least(0, every=every)
    require_at_least(2, draws=draws)
    every = every or max(1, config.steps // 2)
    told = [{"step": step, **shares} for step, shares in _along(config, proxy_updates, every, draws)]
    note = (config.output or Path("runs/variance")) / NOTE
    atomic.write(note, (json.dumps({"batch": config.batch_size, "measured": told}, indent=1) + "\n").encode())
    print(note)


def _along(
    setting: DistillConfig, updates: int, every: int, draws: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Updates so far and the share of noise of every place, each time that it is measured."""
    from fewstep.methods.dmd import DistributionMatching, Dmd
    from fewstep.train.train_step import State

    one = setting.build_context("gradient-noise")
    proxy, student = one.trainable("proxy"), one.student
    matching = DistributionMatching(one.guided_teacher, proxy.velocity, "renoise")
    run = one.run(Dmd(student.net, student.velocity, proxy.net, matching, one.grid, updates), proxy)
    state = State(run)
    for step in sorted({*range(0, setting.steps, every), setting.steps}):
        while state.step < step:
            state.train_step()
        shares = {
            where: _measured(one, state, replace(matching, score_point=where), draws) for where in PLACES
        }
        print(f"step {step}: " + ", ".join(f"{where} {share:.2f}" for where, share in shares.items()))
        yield step, shares


def _measured(one: DistillContext, state: State, matching: DistributionMatching, draws: int) -> float:
    """The share of noise in the student's gradient."""
    import torch

    from fewstep.core.types import WHOLE
    from fewstep.train.device import attention, to_device, use_bf16
    from fewstep.train.train_step import draw

    options, batches = state.run.options, state.run.batches
    for net in state.nets.values():
        net.requires_grad_(net is one.student.net)

    def losses(number: int) -> Losses:
        batch = to_device(batches(FRESH + number, WHOLE), state.device)
        rollout = Rollout(one.student.velocity, one.grid)
        low = use_bf16(options.precision, state.device)
        with (
            torch.autocast(state.device, torch.bfloat16, enabled=low),
            attention(state.device, options.tokens),
        ):
            return {
                "matching": matching.student_loss(rollout, batch, draw(options.seed, FRESH, number))[
                    "matching"
                ]
            }

    return gradient_noise_fraction(one.student.net, losses, draws)
