"""The noise and the bias of the distribution matching gradient along a training.

The noise is that of batches. The bias is that of a proxy that lags behind the student: the gradient is
compared with one of a large batch and of a proxy that was trained on while the student was held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fewstep.core import atomic
from fewstep.core.progress import emit, say
from fewstep.core.types import UserError
from fewstep.core.validate import require_at_least, require_positive
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.context import DistillContext
from fewstep.distill.matching import DEFAULT_MATCHING, MatchingConfig, matching_loss
from fewstep.distill.setup import build_context, build_run
from fewstep.methods.base import Losses, Update
from fewstep.methods.dmd import DMD, DistributionMatching
from fewstep.methods.rollout import Rollout

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

    from fewstep.train.train_step import State

FILE = "noise.json"

FRESH = 10**6
"""Batches from this step on belong to the measurement alone: no training has so many steps."""


@dataclass(frozen=True)
class GradientMoments:
    """What is known of a gradient from independent draws.

    Attributes:
        mean: mean of the draws, ``[P]``.
        square: mean squared norm of the draws.
        draws: their number, at least 2.
    """

    mean: torch.Tensor
    square: float
    draws: int

    @property
    def variance(self) -> float:
        """The trace of the covariance of one draw, unbiased."""
        return (self.square - self._mean_square) * self.draws / (self.draws - 1)

    @property
    def signal(self) -> float:
        """The squared norm of the true mean, unbiased; it may be negative where noise prevails."""
        return self._mean_square - self.variance / self.draws

    @property
    def noise(self) -> float:
        """The share of noise in a draw: 0 where all draws agree, 1 where the true mean is 0."""
        return self.variance / self.square if self.square else float("nan")

    @property
    def _mean_square(self) -> float:
        return float(self.mean.square().sum())

    def cosine(self, other: GradientMoments) -> float:
        """Return the cosine between the true means."""
        size = self.signal * other.signal
        return float(self.mean @ other.mean) / size**0.5 if size > 0 else float("nan")

    def relative_bias(self, reference: GradientMoments) -> float:
        """Return the squared distance of the true means over the squared norm of the reference's."""
        apart = float((self.mean - reference.mean).square().sum())
        apart -= self.variance / self.draws + reference.variance / reference.draws
        return apart / reference.signal if reference.signal > 0 else float("nan")


def gradient_moments(net: Module, losses: Callable[[int], Losses], draws: int) -> GradientMoments:
    """Return the moments of a gradient.

    Args:
        net: whose parameters the gradient is of.
        losses: index of a draw to its losses, each of a batch and noise of its own.
        draws: number of draws, at least 2.
    """
    import torch

    parameters = [p for p in net.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    squares = 0.0
    for number in range(draws):
        trained = [value for value in losses(number).values() if value.requires_grad]
        loss = sum(trained[1:], start=trained[0])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total += flat
        squares += float(flat.square().sum()) / draws
    return GradientMoments(total / draws, squares, draws)


def gradient_noise(
    *,
    config: DistillConfig = DEFAULT,
    score_point: Literal["shared", "shared-free", "renoise"] = "shared",
    proxy_target: Literal["finals", "estimates", "path"] = "path",
    matching: MatchingConfig = DEFAULT_MATCHING,
    every: int = 0,
    draws: int = 8,
    reference_updates: int = 0,
    reference_draws: int = 32,
) -> None:
    """Measure how noisy and how biased the gradient of distribution matching is, along a training.

    Writes `noise.json` with the share of noise in a draw, per measurement. With --reference-updates it also
    has the cosine and the relative squared distance to the gradient of a converged proxy.

    Args:
        config: Shared.
        score_point: Where the scores are compared: on the renoised estimate, or on the student's trajectory.
        proxy_target: What the proxy models: the student's samples, its estimates at a random step, or its
            trajectory where the scores are compared.
        matching: Shared.
        every: Training steps between two measurements; 0 measures before, halfway and after.
        draws: Gradients per measurement, each of a batch of its own.
        reference_updates: Further updates of the proxy for the reference, the student held; 0 makes none.
        reference_draws: Gradients of the reference.
    """
    require_positive(steps=config.steps)
    require_at_least(0, every=every, reference_updates=reference_updates)
    require_at_least(2, draws=draws, reference_draws=reference_draws)
    matching.check(config, score_point)
    if reference_updates and config.lora:
        raise UserError("--reference-updates needs a second proxy: it is not for --lora")
    context = build_context(config, "gradient-noise")
    proxy, student = context.trainable("proxy"), context.student
    loss = matching_loss(context, proxy.velocity, score_point, proxy_target, matching)
    method = DMD(
        student.net, student.velocity, proxy.net, loss, context.grid, matching.proxy_updates,
        matching.ida_decay, matching.fresh_rollouts,
    )  # fmt: skip
    run = build_run(context, method, proxy, net_lrs={"proxy": matching.proxy_lr or config.lr})
    measured: list[dict[str, float | None]] = []
    for state in _along_training(run, every or max(1, config.steps // 2)):
        own = _moments(context, state, loss, draws, FRESH)
        found: dict[str, float] = {"step": state.step, "noise": own.noise}
        if reference_updates:
            converged = _converged(context, state, loss, matching, reference_updates)
            reference = _moments(context, state, converged, reference_draws, 2 * FRESH)
            found["cosine"], found["bias"] = own.cosine(reference), own.relative_bias(reference)
        say(", ".join(f"{name} {value:.3g}" for name, value in found.items()))
        # JSON has no NaN: a figure without a value, such as a direction that noise hides, is null.
        measured.append({name: value if math.isfinite(value) else None for name, value in found.items()})
    path = context.folder / FILE
    record = {
        "batch": config.batch_size, "draws": draws, "score_point": score_point, "proxy_target": proxy_target,
        "reference_updates": reference_updates, "measured": measured,
    }  # fmt: skip
    atomic.write(path, (json.dumps(record, indent=1) + "\n").encode())
    emit(str(path))


def _along_training(run: Any, every: int) -> Iterator[State]:
    """Yield the state of a training, at the steps where it is measured."""
    from fewstep.train.train_step import State

    state, steps = State(run), run.options.steps
    for step in sorted({*range(0, steps, every), steps}):
        while state.step < step:
            state.train_step()
        yield state


def _moments(
    context: DistillContext, state: State, matching: DistributionMatching, draws: int, first: int
) -> GradientMoments:
    """Return the moments of the student's gradient, over the batches from ``first`` on."""
    import torch

    from fewstep.core.types import WHOLE
    from fewstep.train.device import attention, to_device, use_bf16
    from fewstep.train.train_step import draw

    options, batches, student = state.run.options, state.run.batches, context.student
    for net in state.nets.values():
        net.requires_grad_(net is student.net)

    def losses(number: int) -> Losses:
        batch = to_device(batches(first + number, WHOLE), state.device)
        rollout = Rollout(student.velocity, context.grid)
        random = draw(options.seed, first + number, 0, device=state.device)
        half = use_bf16(options.precision, state.device)
        with (
            torch.autocast(state.device, torch.bfloat16, enabled=half),
            attention(state.device, options.tokens),
        ):
            return {"matching": matching.student_loss(rollout, batch, random)["matching"]}

    return gradient_moments(student.net, losses, draws)


@dataclass(frozen=True)
class _ProxyAlone:
    """Trains a proxy of a student that is held, on new trajectories in each update."""

    proxy: Module
    matching: DistributionMatching
    student: Any
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Module]:
        return {"proxy": self.proxy}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("proxy", partial(self.matching.proxy_loss, Rollout(self.student, self.grid)))]


def _converged(
    context: DistillContext,
    state: State,
    matching: DistributionMatching,
    options: MatchingConfig,
    updates: int,
) -> DistributionMatching:
    """Return the losses with a copy of the proxy that is trained on while the student is held."""
    from fewstep.train.train_step import State

    copy = context.trainable("proxy")
    copy.net.load_state_dict(state.nets["proxy"].state_dict())
    own = replace(matching, proxy=copy.velocity)
    method = _ProxyAlone(copy.net, own, context.student.velocity, context.grid)
    run = build_run(context, method, copy)
    rate = options.proxy_lr or context.config.lr
    held = replace(run.options, steps=updates, lr=rate, decay=0.5, seed=run.options.seed + state.step + 1)
    # The folder does not exist, so nothing is resumed and nothing is written.
    trained = State(replace(run, folder=Path("unused"), options=held, averaged=[], keep=None))
    while trained.step < updates:
        trained.train_step()
    copy.net.requires_grad_(False)
    return own
