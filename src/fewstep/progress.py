"""What long work is doing, in lines on standard error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from fewstep.signals import check

FIRST, EVERY = 10.0, 30.0
"""Seconds until a stage is named, and from then on between lines where standard error is no terminal."""

_stages: list[Stage] = []
"""Those that go on, each within the one before; the last one is told of."""


class Stage:
    """A stage of long work."""

    def __init__(self, name: str) -> None:
        self._name, self._place = name, ""

    def at(self, done: int, total: int) -> None:
        """Note how far it is.

        Raises:
            Stop: the command was asked to end, and a library lost it.
        """
        check()
        self._place = f": {done} of {total}"

    def __str__(self) -> str:
        return f"fewstep: {self._name}{self._place}"


@contextmanager
def stage(name: str) -> Generator[Stage]:
    """Tell what goes on in the block, if it takes long.

    Args:
        name: such as ``loading the teacher``.
    """
    check()
    here, end = Stage(name), threading.Event()
    _stages.append(here)
    threading.Thread(target=_tell, args=(here, end), daemon=True).start()
    try:
        yield here
    finally:
        end.set()
        _stages.remove(here)


def _tell(here: Stage, end: threading.Event) -> None:
    wait = FIRST
    while not end.wait(wait):
        wait = EVERY
        if _stages[-1:] == [here]:
            with suppress(OSError, ValueError):  # whoever read it has left
                print(here, file=sys.stderr, flush=True)
                if sys.stderr.isatty():
                    return
