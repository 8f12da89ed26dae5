"""The memory of a training step, counted while it runs (:mod:`fewstep.modules.memory_tracker`).

No formula of ours: the very step of :class:`fewstep.train.train_step.State` runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fewstep.methods.base import InPlaceUpdate, Losses, Method, StepRandom, Update
from fewstep.modules.memory_tracker import MemoryTracker, Peak
from fewstep.train.run import Run
from fewstep.train.train_step import State


@dataclass(frozen=True)
class TrackedMethod:
    """A method that tells a ledger whose turn it is."""

    method: Method
    ledger: MemoryTracker

    @property
    def nets(self) -> Mapping[str, Any]:
        return self.method.nets

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        return [
            turn if isinstance(turn, InPlaceUpdate) else replace(turn, losses=partial(self._losses, turn))
            for turn in self.method.updates(step)
        ]

    def _losses(self, turn: Update, batch: Any, draw: StepRandom) -> Losses:
        self.ledger.begin(turn.net)
        return turn.losses(batch, draw)


def profile_steps(run: Run, ledger: MemoryTracker, steps: int = 1) -> dict[str, Peak]:
    """Take steps of a run within an entered ledger; the peak of every turn, by the net that learns.

    Optimizers hold what they know of earlier steps: with one step, they are made to before it.
    """
    state = State(replace(run, method=TrackedMethod(run.method, ledger)))
    if steps == 1:
        for net, optimizer in ((state.nets[n], o) for n, o in state.optimizers.items()):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    gc.collect()
    for body in state.bodies:
        _tag(ledger, [*body.net.parameters(), *body.net.buffers()], "frozen")
    for name, net in state.nets.items():
        _tag(ledger, net.parameters(), "learning")
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(partial(_gradient, ledger))
        if name in state.averages:
            _tag(ledger, state.averages[name].values.values(), "averages")
    for _ in range(steps):
        for optimizer in state.optimizers.values():
            _tag(ledger, (t for held in optimizer.state.values() for t in held.values()), "optimizer")
        ledger.peaks.clear()
        ledger.begin("")
        state.train_step()
    return {turn: peak for turn, peak in ledger.peaks.items() if turn}


def _gradient(ledger: MemoryTracker, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        ledger.track(parameter.grad, "gradients")


def _tag(ledger: MemoryTracker, tensors: Iterable[Any], kind: str) -> None:
    for tensor in tensors:
        ledger.track(tensor, kind)


def measure_steps(run: Run) -> int:
    """Take two real steps on the GPU: the bytes that torch's allocator had given out at most in the second.

    Nothing else may have tensors there.
    """
    state = State(run)
    state.train_step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    state.train_step()
    return torch.cuda.max_memory_allocated()
