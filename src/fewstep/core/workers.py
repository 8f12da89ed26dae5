"""Processes that compute for this one, and end when it does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, parent_process

from fewstep.core.signals import NAMES


@contextmanager
def pool(
    workers: int, initializer: Callable[..., None] | None = None, *arguments: object
) -> Generator[ProcessPoolExecutor]:
    """Worker processes. Where the block ends with an error or a signal, they are killed.

    What they leave unfinished goes when whoever holds the folder lets go of it
    (:func:`fewstep.core.atomic.held`).

    Args:
        workers: how many.
        initializer: called in each of them first of all.
        arguments: of it.
    """
    executor = ProcessPoolExecutor(workers, initializer=_begin, initargs=(initializer, arguments))
    try:
        yield executor
    except BaseException:
        children = list((getattr(executor, "_processes", None) or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()
        for child in children:
            child.join()
        raise
    executor.shutdown()


def _begin(initializer: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    """Leave a terminal's signals to the parent, and end when it ends.

    A forked worker holds the parent's locks as well: one that outlived it would keep its folder locked.
    """
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL if name == "SIGTERM" else signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
