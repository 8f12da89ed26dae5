"""Train a run from its first step, or its last checkpoint, to its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from types import FrameType

from fewstep.core import atomic, signals
from fewstep.core.progress import say, stage
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
"""Lock file in a run's folder, beside the lock of the command that trains."""


def train(run: Run) -> None:
    """Train a run, from its last checkpoint if there is one, and write its result.

    Ctrl-C, SIGTERM or SIGHUP saves after the step in progress, and the same command continues. Under
    torchrun every process calls it.

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
        say(f"{run.name}: resuming at step {state.step} of {options.steps}")
    record = run.record | {"options": asdict(options)} | environment(state.device)
    with closing(Log(run.folder, run.name, record, state.step)) as log:
        run = _train_steps(run, state, log)
        _evaluate(run, state, log, run.options, last=True)
    nets = state.finished()
    finish = run.finish
    if finish is not None:
        with stage(f"{run.name}: writing the result"):
            distributed.on_rank_zero(
                lambda: finish(nets)
            )  # the others wait, because the next run of a chain reads it


def _train_steps(run: Run, state: State, log: Log) -> Run:
    """Take all training steps and write checkpoints; return the run with its final number of steps."""
    saved, saved_at, monitor = time.monotonic(), state.step, DivergenceMonitor()
    budget = TimeBudget(state.step, saved)
    monitor.load_history(log.earlier)
    with _stop_signals() as received, stage(f"{run.name}: training") as progress:
        while state.step < run.options.steps:
            progress(state.step, run.options.steps)
            figures = state.train_step()
            if run.options.max_minutes:
                state.run = run = replace(run, options=budget.limit(run.options, state.step))
            line = log.write(state.step, figures, run.options)
            if line is not None and run.options.detect_divergence:
                distributed.on_rank_zero(lambda line=line: monitor.check(state.step, line))
            _evaluate(run, state, log, run.options)
            due = time.monotonic() - saved > 60 * run.options.save_minutes
            number, due = distributed.largest([received[0] if received else 0, due])
            if number or due:
                save(run.folder, state.all(), state.step)
                saved, saved_at = time.monotonic(), state.step
            if number:
                raise signals.Stop(int(number))
        if saved_at < state.step:
            save(run.folder, state.all(), state.step)
    return run


WARMUP_STEPS = 20
"""Steps before the timing, in which code is compiled and files are read; also the fewest that are timed."""

TIMED = 0.05
"""Share of the time limit in which steps are timed."""

USED = 0.97
"""Share of the time limit that is planned for steps; their speed varies, and the result is to be written."""


class TimeBudget:
    """Limits the steps of a run to what fits into its time limit.

    Args:
        step: at which the run starts or resumes.
        now: the time then, seconds.
    """

    def __init__(self, step: int, now: float) -> None:
        self._step, self._started, self._timed_from = step, now, now
        self._known = False

    def limit(self, options: TrainOptions, step: int) -> TrainOptions:
        """Return the options, with the number of steps that fits once it is known, equal in all processes."""
        now, timed = time.monotonic(), step - self._step - WARMUP_STEPS
        if timed == 0:
            self._timed_from = now
        long = now - self._timed_from >= TIMED * 60 * options.max_minutes
        if self._known or timed < WARMUP_STEPS or not distributed.all_reduce_any([long])[0]:
            return options
        self._known = True
        left = USED * 60 * options.max_minutes - (now - self._started)
        more = max(0.0, left * timed / (now - self._timed_from))
        steps = int(distributed.means({"steps": min(options.steps, step + more)})["steps"])
        say(f"{steps} steps fit into {options.max_minutes:g} minutes")
        return replace(options, steps=steps)


def _evaluate(run: Run, state: State, log: Log, options: TrainOptions, last: bool = False) -> None:
    """Write a contact sheet, a score and a copy of the nets where they are due. All processes call this.

    After the last step all of them are due; a copy is only where ``keep_every`` asks for copies.
    """

    def due(every: int) -> bool:
        return last or bool(every and state.step % every == 0 and state.step < run.options.steps)

    if run.preview is not None and due(options.preview_every):
        with stage(f"{run.name}: drawing a contact sheet"), state.averaged() as nets:
            log.sheet(state.step, run.preview(nets))
    keep = run.keep
    if keep is not None and options.keep_every and due(options.keep_every):
        with stage(f"{run.name}: keeping a copy"), state.averaged() as nets:
            names = nets if run.averaged is None else run.averaged
            weights = {name: distributed.weights(nets[name]) for name in names}
            distributed.on_rank_zero(lambda: keep(weights, state.step))
    if run.score is not None and due(options.validate_every):
        with stage(f"{run.name}: validating"), state.averaged() as nets:
            log.score(state.step, update_best(run, nets, state.step))


@contextmanager
def _stop_signals() -> Generator[list[int]]:
    """Within the block, collect signals that ask to stop; a second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in received and number == signal.SIGINT:
            raise signals.Stop
        if not received:
            say("stopping after this step, then saving (Ctrl-C again stops at once)")
        received.append(number)

    with signals.handled(receive):
        yield received
