"""A run from its first step, or its last checkpoint, to its end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import asdict
from types import FrameType

from fewstep.train import Run, parallel
from fewstep.train.best import judge
from fewstep.train.checkpoint import save
from fewstep.train.log import Log, circumstances
from fewstep.train.state import State as State
from fewstep.train.state import draw as draw
from fewstep.train.watch import Watch
from fewstep.types import UserError


def train(run: Run) -> None:
    """Carry out a run, from its last checkpoint where there is one, and finish it.

    Ctrl-C or SIGTERM saves after the step in progress; the same command then goes on as if nothing had been.
    Under torchrun every process calls it.

    Raises:
        UserError: the run diverged, or its folder belongs to another recipe.
        KeyboardInterrupt: after a clean stop.
    """
    try:
        _train(run)
    except UserError as error:
        if parallel.world().first:
            raise
        raise UserError(f"process {parallel.world().rank}: {error}") from error


def _train(run: Run) -> None:
    import torch

    options = run.options
    if options.threads:
        torch.set_num_threads(options.threads)
    state = State(run)
    about = run.about | {"options": asdict(options)} | circumstances(state.device)
    with closing(Log(run.folder, run.name, about, state.step)) as log:
        _loop(run, state, log)
        _look(run, state, log, options.sheet_every, options.score_every, last=True)
    nets = state.finished()
    finish = run.finish
    if finish is not None:
        parallel.by_first(lambda: finish(nets))  # others wait: the next run of a chain reads what it wrote


def _loop(run: Run, state: State, log: Log) -> None:
    """Step until the run's steps are done, saving now and then and at the end."""
    options, saved, saved_at, watch = run.options, time.monotonic(), state.step, Watch()
    watch.recall(log.earlier)
    with _asked_to_stop() as stop:
        while state.step < options.steps:
            figures = state.advance()
            line = log.write(state.step, figures, options)
            if line is not None and options.watch:
                parallel.by_first(lambda line=line: watch.see(state.step, line))
            _look(run, state, log, options.sheet_every, options.score_every)
            due = time.monotonic() - saved > 60 * options.save_minutes
            stopping, due = parallel.any_of([bool(stop), due])
            if stopping or due:
                save(run.folder, state.all(), state.step)
                saved, saved_at = time.monotonic(), state.step
            if stopping:
                raise KeyboardInterrupt
        if saved_at < state.step:
            save(run.folder, state.all(), state.step)


def _look(run: Run, state: State, log: Log, sheets: int, scores: int, last: bool = False) -> None:
    """A contact sheet and a score, where this step has one; the last has both. Every process takes part."""

    def due(every: int) -> bool:
        return last or bool(every and state.step % every == 0 and state.step < run.options.steps)

    if run.sheet is not None and due(sheets):
        with state.averaged() as nets:
            log.sheet(state.step, run.sheet(nets))
    if run.score is not None and due(scores):
        with state.averaged() as nets:
            log.score(state.step, judge(run, nets, state.step))


@contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """Ctrl-C or SIGTERM fills the list; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            print(
                "fewstep: stopping after this step, then saving (Ctrl-C again stops at once)", file=sys.stderr
            )
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
