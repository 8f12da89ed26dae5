"""Run ``fewstep`` commands in processes, stop them together, and record their time and memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Annotated

from msgspec import Meta

from fewstep.core import atomic, json_io, signals
from fewstep.core.progress import say
from fewstep.core.types import UserError

Task = Callable[[], None]

DONE, SPENT = "cost.json", "spent.json"
"""Files in a training's folder: its cost, once it is done; its cost so far."""

ENDED = tuple(
    code
    for number in (getattr(signal, name) for name in signals.NAMES if hasattr(signal, name))
    for code in (128 + number, -number)
)
"""Exit codes of a command that a stop signal ended."""

_KIBI = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ``ru_maxrss``."""


class Interrupted(Exception):
    """A command ended early because it received a stop signal."""


class ProcessGroup:
    """Child processes that Ctrl-C, SIGTERM or SIGHUP to this process stops after they have saved.

    They receive SIGTERM, because a terminal's Ctrl-C has reached them already and a second one would stop
    them at once. A second signal, more than a second later, kills them.
    """

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._stopped_at: float | None = None
        self._signal = signal.SIGINT
        self._failure: UserError | None = None

    def run(self, name: str, arguments: Sequence[str], *, threads: int = 0) -> int:
        """Run ``fewstep``, wait for it, and return its largest memory, bytes.

        Args:
            name: used in the error message.
            arguments: of ``fewstep``.
            threads: of its libraries; 0 leaves their choice.

        Raises:
            Interrupted: it was stopped by a signal.
            UserError: it failed; the message has its own last line.
        """
        if self._stopped_at is not None:
            raise Interrupted
        process = subprocess.Popen(
            [sys.executable, "-m", "fewstep", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        )
        self._running.add(process.pid)
        if self._stopped_at is not None:  # a signal came between the two lines before
            _send_signal(process.pid, signal.SIGTERM)
        assert process.stderr is not None
        last = ""
        with process.stderr:
            for line in process.stderr:
                last = line.strip() or last
        _, status, usage = os.wait4(process.pid, 0)
        self._running.discard(process.pid)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code and (self._stopped_at is not None or code in ENDED):
            raise Interrupted
        if code:
            reason = f"ended by {signal.Signals(-code).name}" if code < 0 else last.removeprefix("fewstep: ")
            raise UserError(f"{name} failed: {reason}")
        return usage.ru_maxrss * _KIBI

    def check(self) -> None:
        """Raise in a task that works in this process, if the tasks have been asked to stop.

        Raises:
            Interrupted: they have.
        """
        if self._stopped_at is not None:
            raise Interrupted

    def all(self, tasks: Sequence[Task], jobs: int) -> None:
        """Run tasks, ``jobs`` at once; if one fails, the others stop and save.

        Raises:
            Stop: a signal asked to stop, and all tasks have stopped.
            UserError: the error of the first task that failed.
        """

        def run(task: Task) -> None:
            try:
                if self._stopped_at is not None:
                    raise Interrupted
                task()
            except BaseException as error:
                if self._failure is None and isinstance(error, UserError):
                    self._failure = error
                self._stop(signal.SIGTERM)
                raise

        with self._stopping_children(), ThreadPoolExecutor(jobs) as pool:
            errors = [future.exception() for future in [pool.submit(run, task) for task in tasks]]
        if self._failure is not None:
            raise self._failure
        for error in errors:
            if isinstance(error, Interrupted):
                raise signals.Stop(self._signal)
            if error is not None:
                raise error

    def _stop(self, number: int) -> None:
        self._stopped_at = time.monotonic() if self._stopped_at is None else self._stopped_at
        for pid in list(self._running):
            _send_signal(pid, number)

    @contextmanager
    def _stopping_children(self) -> Generator[None]:
        """Within the block, a stop signal stops the children and not this process."""

        def receive(number: int, frame: FrameType | None) -> None:
            if self._stopped_at is None:
                self._signal = signal.Signals(number)
            again = self._stopped_at is not None and time.monotonic() - self._stopped_at > 1
            self._stop(signal.SIGKILL if again else signal.SIGTERM)

        with signals.handled(receive):
            yield


def counted(progress: Callable[[int, int], None], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks, each reporting how many are done after it."""
    done = count(1)
    progress(0, len(tasks))

    def run(task: Task) -> None:
        task()
        progress(next(done), len(tasks))

    return [partial(run, task) for task in tasks]


def _send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


Seconds = Annotated[float, Meta(ge=0)]


@dataclass
class Cost:
    """The time and memory of a training, over all its processes.

    Attributes:
        command: of ``fewstep distill``, without its folder.
        seconds: total time, with the start of the processes.
        bytes: largest memory of any of the processes.
        begun: number of processes so far.
        since: start of the running process, seconds of the Unix epoch; ``None`` if none is running.
        cut: whether a process was killed, so that its time is known only up to its last file.
    """

    command: list[str] = field(default_factory=list[str])
    seconds: Seconds = 0.0
    bytes: float = 0
    begun: int = 0
    since: Seconds | None = None
    cut: bool = False


def run_training(
    processes: ProcessGroup, folder: Path, arguments: Sequence[str], machine: Sequence[str], threads: int = 0
) -> None:
    """Run or resume ``fewstep distill`` and write ``cost.json``; do nothing if that file exists.

    Args:
        processes: runs the command.
        folder: of the run.
        arguments: everything that the student depends on.
        machine: options of the machine, on which the student does not depend.
        threads: of the process.

    Raises:
        UserError: it failed, was started with other options, or is being trained by another process.
    """
    if (folder / DONE).exists():
        _check_options(folder, read_cost(folder / DONE).command, arguments)
        return
    with atomic.held(folder, "trained"):  # then the child holds the lock, even if this process is killed
        cost = _start(folder, [*arguments, *machine], arguments)
    say(folder.name + (" resumes" if cost.begun > 1 else ""))
    started = time.monotonic()
    try:
        command = ["distill", *cost.command, "--output", str(folder)]
        cost.bytes = max(cost.bytes, processes.run(folder.name, command, threads=threads))
    finally:
        cost.seconds, cost.since = cost.seconds + time.monotonic() - started, None
        _write(folder / SPENT, cost)
    _write(folder / DONE, cost)
    (folder / SPENT).unlink()


def _start(folder: Path, command: list[str], arguments: Sequence[str]) -> Cost:
    """Return the cost so far, and record that the training runs from now on."""
    cost, note = Cost(command), folder / SPENT
    if note.exists():
        cost = read_cost(note)
        _check_options(folder, cost.command, arguments)
        cost.command = command
        if cost.since is not None:  # it was killed: its newest file is from its last moments
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != atomic.LOCK]
            times = [path.stat().st_mtime for path in files]
            cost.seconds, cost.cut = cost.seconds + max(0.0, max(times) - cost.since), True
    cost.begun, cost.since = cost.begun + 1, time.time()
    _write(note, cost)
    return cost


def _check_options(folder: Path, earlier: Sequence[str], arguments: Sequence[str]) -> None:
    if list(earlier)[: len(arguments)] != list(arguments):
        raise UserError(f"{folder} was trained with other options; move it away, or choose another --output")


def read_cost(path: Path) -> Cost:
    """Read the cost of a training.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return json_io.read(path, Cost, python=True)
    except UserError as error:
        raise UserError(f"{error}; move {path.parent} away to train it anew") from None


def _write(path: Path, cost: Cost) -> None:
    atomic.write(path, (json.dumps(asdict(cost), indent=1) + "\n").encode())
