"""How noisy the gradient of distribution matching is, by where the scores are taken, along a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fewstep.methods import Losses
from fewstep.methods.dmd import Matching, Where
from fewstep.methods.rollout import Rollout
from fewstep.recipes.student import Setting

PLACES: tuple[Where, ...] = ("shared", "shared-free", "renoise")


def noise_share(net: Any, losses: Callable[[int], Losses], draws: int) -> float:
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
    return (squares - mean) * draws / (draws - 1) / squares


def variance(
    setting: Setting, *, updates: int = 2, every: int, draws: int = 8, init: str | None = None
) -> list[dict[str, Any]]:
    """Train by matching on renoised estimates; before, halfway and after, measure every place of the scores.

    Args:
        setting: of the training; its steps are cut into stretches of ``every``.
        updates: of the proxy for each of the student's.
        every: updates between two measurements.
        draws: gradients a measurement, of batches of the setting's size.
        init: the warm start.

    Returns:
        ``{"step": updates so far, PLACE: share of noise, ...}`` for every measurement.
    """
    import torch

    from fewstep.methods.dmd import Dmd
    from fewstep.train.device import attention, half, moved
    from fewstep.train.state import State, draw
    from fewstep.types import WHOLE

    one = replace(setting, init=init).lesson("variance")
    proxy, student = one.learner("proxy"), one.student
    matching = Matching(one.guided, proxy.velocity, "renoise")
    run = one.run(Dmd(student.net, student.velocity, proxy.net, matching, one.grid, updates), proxy)
    state = State(run)
    low = half(run.options.precision, state.device)

    def measured(where: Where) -> float:
        student.net.requires_grad_(True)
        proxy.net.requires_grad_(False)
        place = replace(matching, where=where)

        def losses(number: int) -> Losses:
            batch = moved(run.batches(10**6 + number, WHOLE), state.device)
            rollout = Rollout(student.velocity, one.grid)
            with (
                torch.autocast(state.device, torch.bfloat16, enabled=low),
                attention(state.device, run.options.tokens),
            ):
                return {
                    "matching": place.match(rollout, batch, draw(setting.seed, 10**6, number))["matching"]
                }

        return noise_share(student.net, losses, draws)

    told: list[dict[str, Any]] = []
    for step in range(0, setting.steps + 1, every):
        while state.step < step:
            state.advance()
        told.append({"step": step, **{where: measured(where) for where in PLACES}})
    return told
