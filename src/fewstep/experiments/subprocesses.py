"""``fewstep`` commands in processes of their own: stopped together, and each with what it cost."""

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
from pathlib import Path
from types import FrameType
from typing import Annotated

from msgspec import Meta

from fewstep.core import atomic, json_io, signals
from fewstep.core.types import UserError

DONE, SPENT = "cost.json", "spent.json"
"""In a training's folder: what it cost, once it is done; what it has cost until then."""

ENDED = tuple(
    code
    for number in (getattr(signal, name) for name in signals.NAMES if hasattr(signal, name))
    for code in (128 + number, -number)
)
"""Exit codes of a command that a signal ended which asked it to."""

_KIBI = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of ``ru_maxrss``."""


class Interrupted(Exception):
    """A command ended early because it was asked to."""


class ProcessGroup:
    """Children that a Ctrl-C, SIGTERM or SIGHUP to this process stops and lets save, however it was sent.

    They are told by SIGTERM, for a terminal's Ctrl-C has reached them already, and a second one would stop
    them at once. What asks twice, a second apart, kills them.
    """

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._asked: float | None = None
        self._signal = signal.SIGINT
        self._failure: UserError | None = None

    def run(self, name: str, arguments: Sequence[str], *, threads: int = 0) -> int:
        """Run ``fewstep`` and wait for it; the most memory that it held, bytes.

        Args:
            name: what it is called when it fails.
            arguments: of ``fewstep``.
            threads: of its libraries; 0 leaves their choice.

        Raises:
            Stopped: it was asked to stop, and did.
            UserError: it failed; its own last line is told.
        """
        if self._asked is not None:
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
        if self._asked is not None:  # between the two lines before
            _tell(process.pid, signal.SIGTERM)
        assert process.stderr is not None
        last = ""
        with process.stderr:
            for line in process.stderr:
                last = line.strip() or last
        _, status, usage = os.wait4(process.pid, 0)
        self._running.discard(process.pid)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code and (self._asked is not None or code in ENDED):
            raise Interrupted
        if code:
            why = f"ended by {signal.Signals(-code).name}" if code < 0 else last.removeprefix("fewstep: ")
            raise UserError(f"{name} failed: {why}")
        return usage.ru_maxrss * _KIBI

    def all(self, tasks: Sequence[Callable[[], None]], jobs: int) -> None:
        """Carry out tasks, ``jobs`` at once; where one fails, the others stop and save.

        Raises:
            Stop: asked to stop, and all have.
            UserError: of the first that failed.
        """

        def carry_out(task: Callable[[], None]) -> None:
            try:
                if self._asked is not None:
                    raise Interrupted
                task()
            except BaseException as error:
                if self._failure is None and isinstance(error, UserError):
                    self._failure = error
                self._stop(signal.SIGTERM)
                raise

        with self._heeding(), ThreadPoolExecutor(jobs) as pool:
            ends = [future.exception() for future in [pool.submit(carry_out, task) for task in tasks]]
        if self._failure is not None:
            raise self._failure
        for error in ends:
            if isinstance(error, Interrupted):
                raise signals.Stop(self._signal)
            if error is not None:
                raise error

    def _stop(self, number: int) -> None:
        self._asked = time.monotonic() if self._asked is None else self._asked
        for pid in list(self._running):
            _tell(pid, number)

    @contextmanager
    def _heeding(self) -> Generator[None]:
        """A signal that asks to stop stops the children, not this process."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._asked is None:
                self._signal = signal.Signals(number)
            again = self._asked is not None and time.monotonic() - self._asked > 1
            self._stop(signal.SIGKILL if again else signal.SIGTERM)

        with signals.handled(note):
            yield


def _tell(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


Seconds = Annotated[float, Meta(ge=0)]


@dataclass
class Cost:
    """What a training has cost, over all the times that it was begun.

    Attributes:
        command: of ``fewstep distill``, without its folder.
        seconds: from beginning to end, starting the processes included.
        bytes: the most memory of any of the processes.
        begun: how often it was begun.
        since: when the process that goes on was begun, seconds of the Unix epoch; ``None`` where none does.
        cut: whether one of them was killed, so that its time is known to its last trace alone.
    """

    command: list[str] = field(default_factory=list[str])
    seconds: Seconds = 0.0
    bytes: float = 0
    begun: int = 0
    since: Seconds | None = None
    cut: bool = False


def run_training(
    processes: ProcessGroup, folder: Path, arguments: Sequence[str], place: Sequence[str], threads: int = 0
) -> None:
    """Carry out ``fewstep distill``, or go on with it, and write ``cost.json``; nothing where that is there.

    Args:
        processes: who runs it.
        folder: of the run.
        arguments: all that the student depends on.
        place: options of where it is trained, on which it does not depend.
        threads: of the process.

    Raises:
        UserError: it failed, was begun with other options, or is being trained by another process.
    """
    if (folder / DONE).exists():
        _same(folder, read_cost(folder / DONE).command, arguments)
        return
    with atomic.held(folder, "trained"):  # from here on the child holds it, even if this process is killed
        cost = _begun(folder, [*arguments, *place], arguments)
    print(f"fewstep: {folder.name}" + (" goes on" if cost.begun > 1 else ""), file=sys.stderr)
    began = time.monotonic()
    try:
        command = ["distill", *cost.command, "--output", str(folder)]
        cost.bytes = max(cost.bytes, processes.run(folder.name, command, threads=threads))
    finally:
        cost.seconds, cost.since = cost.seconds + time.monotonic() - began, None
        _write(folder / SPENT, cost)
    _write(folder / DONE, cost)
    (folder / SPENT).unlink()


def _begun(folder: Path, command: list[str], arguments: Sequence[str]) -> Cost:
    """What a training has cost so far; from now on it goes on."""
    cost, note = Cost(command), folder / SPENT
    if note.exists():
        cost = read_cost(note)
        _same(folder, cost.command, arguments)
        cost.command = command
        if cost.since is not None:  # it was killed: its last file tells until when it went on
            left = [path for path in folder.rglob("*") if path.is_file() and path.name != atomic.LOCK]
            traces = [path.stat().st_mtime for path in left]
            cost.seconds, cost.cut = cost.seconds + max(0.0, max(traces) - cost.since), True
    cost.begun, cost.since = cost.begun + 1, time.time()
    _write(note, cost)
    return cost


def _same(folder: Path, there: Sequence[str], asked: Sequence[str]) -> None:
    if list(there)[: len(asked)] != list(asked):
        raise UserError(f"{folder} was trained with other options; move it away, or choose another --output")


def read_cost(path: Path) -> Cost:
    """What a training has cost.

    Raises:
        UserError: the note cannot be read.
    """
    try:
        return json_io.read(path, Cost, python=True)
    except UserError as error:
        raise UserError(f"{error}; move {path.parent} away to train it anew") from None


def _write(path: Path, cost: Cost) -> None:
    atomic.write(path, (json.dumps(asdict(cost), indent=1) + "\n").encode())
