"""Shows progress on standard error: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core.signals import check
from fewstep.core.types import UserError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


FIRST, EVERY = 10.0, 30.0
"""Seconds until a stage is named, and from then on between lines where standard error is no terminal."""


STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that steer a terminal or turn the direction of text; a line's end is none of them."""


def printable(text: str, keep: str = "") -> str:
    """``text`` with a space for each character that would steer a terminal, but those of ``keep``."""
    return "".join(sign if sign.isprintable() or sign in keep else " " for sign in text)


def say(line: str) -> None:
    """Print ``fewstep: LINE`` on standard error. A closed standard error is no error."""
    with suppress(OSError, ValueError):
        print(f"fewstep: {' '.join(printable(line).split())}", file=sys.stderr, flush=True)


def emit(line: str) -> None:
    """Print a line to standard output at once, without characters that steer a terminal.

    Raises:
        UserError: standard output is full or broken.
        BrokenPipeError: the reader has closed it.
    """
    with stdout_errors():
        print(STEERING.sub(" ", line), flush=True)


@contextmanager
def stdout_errors() -> Generator[None]:
    """Within the block an error of standard output is one line.

    Raises:
        UserError: standard output is full or broken.
        BrokenPipeError: the reader has closed it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to standard output: {error.strerror}") from None


def on_terminal() -> bool:
    """Whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


_running: list[Progress] = []
"""Those that go on, each within the one before; the last one speaks."""


class Progress:
    """Names the stages of long work and counts what is done, on standard error.

    On a terminal each stage has a bar. Elsewhere a line names a stage that has lasted ten seconds, and
    another line says every half minute how far it is, also while one long call is running. So short work
    says nothing, and a refusal is one line.

        with Progress() as progress:
            progress("tracing")
            for index in range(256):
                progress("calibrating", index, 256)

    Args:
        first: seconds until a stage is named.
        every: seconds between two lines of a stage.
        bars: whether a terminal gets bars; they take some time of a core.
    """

    def __init__(self, first: float = FIRST, every: float = EVERY, *, bars: bool = True) -> None:
        self._first_line, self._every, self._wanted = first, every, bars
        self._due = 0.0
        self._over = threading.Event()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage, self._began, self._first = "", 0.0, 0
        self._done = self._total = 0

    def __enter__(self) -> Progress:
        check()
        _running.append(self)
        if self._wanted and on_terminal():
            self._bars, self._tasks = _bars(), {}
            self._bars.start()
        else:
            self._over = threading.Event()
            threading.Thread(target=self._repeat, args=(self._over,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        _running.remove(self)
        if self._bars is not None:
            self._bars.stop()
        else:
            self._over.set()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done.

        Args:
            stage: its name.
            done: how much of it is done; the first value may be what an earlier run did.
            total: of how much; 0 if unknown.

        Raises:
            Stop: the command was asked to end, and a library lost it.
        """
        check()
        if stage != self._stage:
            self._end_stage()
            self._stage, self._began, self._first = stage, time.monotonic(), done
            self._due = self._began + self._first_line
        self._done, self._total = done, total
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(printable(stage))
            self._bars.update(self._tasks[stage], completed=done, total=total or None)

    def _end_stage(self) -> None:
        """A bar that counts nothing would run on after its stage."""
        if self._bars is not None and self._stage in self._tasks and not self._total:
            self._bars.update(self._tasks[self._stage], completed=1, total=1)

    def _repeat(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self._first_line, self._every)):
            running = self._stage and not (self._total and self._done >= self._total)
            if running and _running[-1:] == [self] and (now := time.monotonic()) >= self._due:
                self._due = now + self._every
                say(self._line())

    def _line(self) -> str:
        spent = time.monotonic() - self._began
        parts = [self._stage]
        if self._total and (self._done or spent > 1):
            parts.append(f"{self._done} of {self._total}")
        if spent > 1:
            parts.append(f"{duration(spent)} so far")
        if (new := self._done - self._first) > 0 and self._total > self._done:
            parts.append(f"about {duration((self._total - self._done) * spent / new)} left")
        return ", ".join(parts)


def _bars() -> Bars:
    """Bars on standard error; what is printed meanwhile stands above them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # else rich sends to the terminal what belongs into a file
    )


@contextmanager
def stage(name: str) -> Generator[Callable[[int, int], None]]:
    """A stage of long work that has lines, and no bar: what prints lines of its own would break it.

    Args:
        name: such as ``loading the teacher``.

    Yields:
        A function of how much is done, and of how much in all.
    """
    with Progress(FIRST, EVERY, bars=False) as progress:
        progress(name)
        yield partial(progress, name)
