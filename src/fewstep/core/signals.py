"""Signals that ask a command to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that goes away."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

# The command line imports this first, because signals are not handled before.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import FrameType

NAMES = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""Signal -> what is said of a command that it ended. Not every system has all."""

AGAIN = 1.0
"""Seconds in which a second signal is the same one: a terminal and a launcher both send theirs."""


class Stop(KeyboardInterrupt):
    """A signal ended the command.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 128 + self.number

    @property
    def word(self) -> str:
        return NAMES[signal.Signals(self.number).name]


_last: tuple[Stop, float] | None = None
"""The last signal that was raised as an exception, and when."""


def listen() -> None:
    """Raise :class:`Stop` in the main thread at each of these signals, from now on."""
    for number in _numbers():
        signal.signal(number, _raise)


def unlisten() -> None:
    """Let these signals end the process at once: nothing is left that could be lost."""
    for number in _numbers():
        signal.signal(number, signal.SIG_DFL)


def check() -> None:
    """Raise a signal once more that was raised and lost: some libraries swallow exceptions, or raise others.

    Raises:
        Stop: there was one.
    """
    if _last is not None:
        raise Stop(_last[0].number)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Handle these signals by ``handler`` within the block, and restore the handlers after it.

    A signal that the process ignores, such as SIGHUP under ``nohup``, stays ignored.

    Raises:
        Stop: one was raised before, and lost.
    """
    check()
    before = {number: signal.signal(number, handler) for number in _numbers()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _numbers() -> list[int]:
    """Return the numbers of these signals, without ignored ones except SIGINT.

    A shell makes processes started with ``&`` ignore SIGINT. Sending it to such a process is deliberate.
    """
    there = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [n for n in there if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]


def _raise(number: int, frame: FrameType | None) -> None:
    global _last
    now = time.monotonic()
    if _last is not None and now - _last[1] < AGAIN:
        return
    if _imports_torch(frame):
        import threading

        later = threading.Timer(0.05, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()
        return
    stop = Stop(number)
    _last = stop, now
    raise stop


def _imports_torch(frame: FrameType | None) -> bool:
    """Return whether torch is being imported. Its C++ code ends the process if an exception comes then."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<module>" and module.partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False
