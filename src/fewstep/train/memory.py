"""The memory of a training step, counted while it runs (:mod:`fewstep.modules.memory_tracker`).

No formula estimates it: :meth:`fewstep.train.train_step.State.train_step` itself runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fewstep.methods.base import InPlaceUpdate, Losses, Method, StepRandom, Update
from fewstep.modules.memory_tracker import MemoryTracker, Peak
from fewstep.train.run import Run
from fewstep.train.train_step import State


@dataclass(frozen=True)
class TrackedMethod:
    """A method that names the net of each update to a memory tracker."""

    method: Method
    tracker: MemoryTracker

    @property
    def nets(self) -> Mapping[str, torch.nn.Module]:
        return self.method.nets

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        return [
            update
            if isinstance(update, InPlaceUpdate)
            else replace(update, losses=partial(self._losses, update))
            for update in self.method.updates(step)
        ]

    def _losses(self, update: Update, batch: object, random: StepRandom) -> Losses:
        self.tracker.begin(update.net)
        return update.losses(batch, random)


def profile_steps(run: Run, tracker: MemoryTracker, steps: int = 1) -> dict[str, Peak]:
    """Take training steps within an active memory tracker; return the peak of every update, by its net.

    With a single step the optimizers are given their state beforehand, as they have it in later steps.
    """
    state = State(replace(run, method=TrackedMethod(run.method, tracker)))
    if steps == 1:
        for net, optimizer in ((state.nets[n], o) for n, o in state.optimizers.items()):
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    gc.collect()
    for body in state.bodies:
        _tag(tracker, [*body.net.parameters(), *body.net.buffers()], "frozen")
    for name, net in state.nets.items():
        _tag(tracker, net.parameters(), "learning")
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(partial(_tag_gradient, tracker))
        if name in state.averages:
            _tag(tracker, state.averages[name].values.values(), "averages")
    for _ in range(steps):
        for optimizer in state.optimizers.values():
            _tag(tracker, (t for state in optimizer.state.values() for t in state.values()), "optimizer")
        tracker.peaks.clear()
        tracker.begin("")
        state.train_step()
    return {update: peak for update, peak in tracker.peaks.items() if update}


def _tag_gradient(tracker: MemoryTracker, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        tracker.track(parameter.grad, "gradients")


def _tag(tracker: MemoryTracker, tensors: Iterable[torch.Tensor], kind: str) -> None:
    for tensor in tensors:
        tracker.track(tensor, kind)


def measure_steps(run: Run) -> int:
    """Take two training steps on the GPU; return the peak of torch's allocator in the second, bytes.

    No other tensors may be on the GPU.
    """
    state = State(run)
    state.train_step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    state.train_step()
    return torch.cuda.max_memory_allocated()
