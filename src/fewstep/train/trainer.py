"""A run from its first step, or its last checkpoint, to its end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from types import FrameType

from fewstep.core import atomic, signals
from fewstep.core.progress import stage
from fewstep.core.types import UserError
from fewstep.train import distributed
from fewstep.train.best_checkpoint import update_best
from fewstep.train.checkpoint import save
from fewstep.train.device import resolve_device
from fewstep.train.divergence import DivergenceMonitor
from fewstep.train.log import Log, environment
from fewstep.train.run import Run, TrainOptions
from fewstep.train.train_step import State

LOCK = ".train.lock"
"""Of a run's folder. The command that trains has the folder's own lock, of which this one knows nothing."""


def train(run: Run) -> None:
    """Carry out a run, from its last checkpoint where there is one, and finish it.

    Ctrl-C, SIGTERM or SIGHUP saves after the step in progress; the same command then goes on as if nothing
    had been. Under torchrun every process calls it.

    Raises:
        UserError: the run diverged, its folder belongs to another recipe, or another process trains there.
        Stop: after a clean stop.
    """
    distributed.init_distributed(resolve_device(run.options.device))
    try:
        with ExitStack() as stack:
            distributed.on_rank_zero(lambda: stack.enter_context(atomic.held(run.folder, "trained", LOCK)))
            _train(run)
    except UserError as error:
        if distributed.world().first:
            raise
        raise UserError(f"process {distributed.world().rank}: {error}") from error


def _train(run: Run) -> None:
    import torch

    options = run.options
    if options.threads:
        torch.set_num_threads(options.threads)
    with stage(f"{run.name}: setting up"):
        state = State(run)
    if state.step and distributed.world().first:
        print(f"fewstep: {run.name}: resuming at step {state.step} of {options.steps}", file=sys.stderr)
    about = run.record | {"options": asdict(options)} | environment(state.device)
    with closing(Log(run.folder, run.name, about, state.step)) as log:
        run = _loop(run, state, log)
        _look(run, state, log, options.preview_every, options.validate_every, last=True)
    nets = state.finished()
    finish = run.finish
    if finish is not None:
        with stage(f"{run.name}: writing the result"):
            distributed.on_rank_zero(lambda: finish(nets))  # others wait: the next run of a chain reads it


def _loop(run: Run, state: State, log: Log) -> Run:
    """Step until all is done, saving now and then and at the end. Returns the run, its steps settled."""
    saved, saved_at, watch = time.monotonic(), state.step, DivergenceMonitor()
    clock = TimeBudget(state.step, saved)
    watch.load_history(log.earlier)
    with _asked_to_stop() as asked, stage(f"{run.name}: training") as here:
        while state.step < run.options.steps:
            here(state.step, run.options.steps)
            figures = state.train_step()
            if run.options.max_minutes:
                state.run = run = replace(run, options=clock.settled(run.options, state.step))
            line = log.write(state.step, figures, run.options)
            if line is not None and run.options.detect_divergence:
                distributed.on_rank_zero(lambda line=line: watch.check(state.step, line))
            _look(run, state, log, run.options.preview_every, run.options.validate_every)
            due = time.monotonic() - saved > 60 * run.options.save_minutes
            number, due = distributed.largest([asked[0] if asked else 0, due])
            if number or due:
                save(run.folder, state.all(), state.step)
                saved, saved_at = time.monotonic(), state.step
            if number:
                raise signals.Stop(int(number))
        if saved_at < state.step:
            save(run.folder, state.all(), state.step)
    return run


SETTLED = 20
"""Steps that are not timed, for what is compiled or read once, and least steps that are."""

TIMED = 0.05
"""Share of a run's minutes in which its steps are timed."""

SPARE = 0.97
"""Of the time: steps are not all equally fast, and what is learnt is to be written."""


class TimeBudget:
    """How many steps fit into a run's minutes.

    Args:
        step: where the run begins, or goes on.
        now: the time there, seconds.
    """

    def __init__(self, step: int, now: float) -> None:
        self._step, self._begun, self._since = step, now, now
        self._known = False

    def settled(self, options: TrainOptions, step: int) -> TrainOptions:
        """The options, with the number of steps that fits once it is known; the same in every process."""
        now, timed = time.monotonic(), step - self._step - SETTLED
        if timed == 0:
            self._since = now
        long = now - self._since >= TIMED * 60 * options.max_minutes
        if self._known or timed < SETTLED or not distributed.all_reduce_any([long])[0]:
            return options
        self._known = True
        left = SPARE * 60 * options.max_minutes - (now - self._begun)
        more = max(0.0, left * timed / (now - self._since))
        steps = int(distributed.means({"steps": min(options.steps, step + more)})["steps"])
        print(f"fewstep: {steps} steps fit into {options.max_minutes:g} minutes", file=sys.stderr)
        return replace(options, steps=steps)


def _look(run: Run, state: State, log: Log, sheets: int, scores: int, last: bool = False) -> None:
    """A contact sheet and a score, where this step has one; the last has both. Every process takes part."""

    def due(every: int) -> bool:
        return last or bool(every and state.step % every == 0 and state.step < run.options.steps)

    if run.preview is not None and due(sheets):
        with stage(f"{run.name}: drawing a sheet"), state.averaged() as nets:
            log.sheet(state.step, run.preview(nets))
    if run.score is not None and due(scores):
        with stage(f"{run.name}: scoring"), state.averaged() as nets:
            log.score(state.step, update_best(run, nets, state.step))


@contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """A signal that asks to stop goes into the list; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in asked and number == signal.SIGINT:
            raise signals.Stop
        if not asked:
            print(
                "fewstep: stopping after this step, then saving (Ctrl-C again stops at once)", file=sys.stderr
            )
        asked.append(number)

    with signals.handled(note):
        yield asked
