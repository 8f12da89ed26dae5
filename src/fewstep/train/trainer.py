"""The loop: it alone zeroes, backwards, clips and steps."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import numpy as np

from fewstep.methods import Draw, Losses, Turn
from fewstep.train import Options, Run
from fewstep.train.checkpoint import restore, save
from fewstep.train.device import attention, half, moved, pick
from fewstep.train.log import Log
from fewstep.types import UserError


def train(run: Run) -> None:
    """Carry out a run, from its last checkpoint where there is one, and finish it.

    Ctrl-C saves after the step in progress; the same command then goes on as if nothing had been.

    Raises:
        UserError: the run diverged, or its folder belongs to another recipe.
        KeyboardInterrupt: after a clean stop.
    """
    import torch

    options = run.options
    if options.threads:
        torch.set_num_threads(options.threads)
    state = State(run)
    about = run.about | {"options": asdict(options)}
    with closing(Log(run.folder, run.name, about, state.step)) as log:
        _loop(run, state, log)
        if run.sheet is not None:
            log.sheet(state.step, run.sheet(state.averaged()))
    if run.finish is not None:
        run.finish(state.averaged())


def _loop(run: Run, state: State, log: Log) -> None:
    """Step until the run's steps are done, saving now and then and at the end."""
    options, saved = run.options, time.monotonic()
    with _asked_to_stop() as stop:
        while state.step < options.steps:
            figures = state.advance()
            log.write(state.step, figures, options)
            if options.sheet_every and state.step % options.sheet_every == 0 and run.sheet is not None:
                log.sheet(state.step, run.sheet(state.averaged()))
            if stop or time.monotonic() - saved > 60 * options.save_minutes:
                save(run.folder, state.all())
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
        save(run.folder, state.all())


class State:
    """Nets, their averages, their optimizers and the step: all that a checkpoint holds."""

    def __init__(self, run: Run) -> None:
        from torch.optim.swa_utils import AveragedModel

        self.run = run
        self.device = pick(run.options.device)
        self.half = half(run.options.precision, self.device)
        self.nets = dict(run.method.nets)
        for net in self.nets.values():
            net.to(self.device).train().requires_grad_(True)
        self.optimizers = {name: _optimizer(net, run.options) for name, net in self.nets.items()}
        # The average warms up, so that it forgets the random start: decay min(ema, (1 + n) / (10 + n)).
        self.averages = {
            name: AveragedModel(net, multi_avg_fn=_averaging(run.options.ema), use_buffers=False)
            for name, net in self.nets.items()
        }
        self.step = restore(run.folder, self.all(), run.about)

    def all(self) -> dict[str, Any]:
        """What is saved and restored, by name."""
        return {"owner": self, "nets": self.nets, "optimizers": self.optimizers, "averages": self.averages}

    def averaged(self) -> dict[str, Any]:
        """The averaged nets, in eval mode."""
        return {name: average.module.eval() for name, average in self.averages.items()}

    def advance(self) -> dict[str, float]:
        """One step: every turn of the method on the batch of this step."""
        rate = _schedule(self.step, self.run.options)
        batch = moved(self.run.batches(self.step), self.device)
        figures: dict[str, float] = {"lr": rate * self.run.options.lr}
        for number, turn in enumerate(self.run.method.turns(self.step)):
            figures |= self._take(turn, batch, draw(self.run.options.seed, self.step, number), rate)
        self.step += 1
        return figures

    def _take(self, turn: Turn, batch: Any, randomness: Draw, rate: float) -> dict[str, float]:
        import torch

        net, optimizer = self.nets[turn.net], self.optimizers[turn.net]
        for group in optimizer.param_groups:
            group["lr"] = rate * self.run.options.lr
        with (
            torch.autocast(self.device, torch.bfloat16, enabled=self.half),
            attention(self.device, self.run.options.tokens),
        ):
            losses = turn.losses(batch, randomness)
        total = _total(losses)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), self.run.options.clip))
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step}: the gradient of {turn.net} is not finite; the run diverged. "
                f"Lower --lr; the last checkpoint in {self.run.folder} still resumes"
            )
        optimizer.step()
        self.averages[turn.net].update_parameters(net)
        return {name: float(value.detach()) for name, value in losses.items()} | {f"norm/{turn.net}": norm}


def draw(seed: int, step: int, turn: int) -> Draw:
    """The randomness of one turn."""
    import torch

    key = np.random.SeedSequence([seed, step, turn])
    generator = torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return Draw(np.random.Generator(np.random.Philox(key)), generator)


def _total(losses: Losses) -> Any:
    learnt = [value for value in losses.values() if value.requires_grad]
    return sum(learnt[1:], start=learnt[0])


def _optimizer(net: Any, options: Options) -> Any:
    import torch

    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)


def _averaging(decay: float) -> Any:
    import torch

    def average(averaged: Sequence[Any], current: Sequence[Any], count: Any) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - keep)  # pyright: ignore[reportPrivateUsage]

    return average


def _schedule(step: int, options: Options) -> float:
    """Share of the rate: up, level, down in a straight line to zero."""
    up = (step + 1) / max(1, options.warmup)
    down = (options.steps - step) / max(1.0, options.decay * options.steps)
    return min(1.0, up, down)


@contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """Ctrl-C fills the list; a second one stops at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("fewstep: stopping after this step, then saving (Ctrl-C again stops at once)", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
