"""Processor cores and threads."""

from __future__ import annotations

import os

from fewstep.core.validate import check_int

PER_CORE, ALWAYS = 4, 16
"""Most threads per core, and the number that is allowed on any machine."""


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(count: object, least: int = 0) -> int:
    """Return a number of processor threads: at most ``PER_CORE`` per core, and ``ALWAYS`` on any machine.

    Each takes memory, and more than there are cores only wait for each other.

    Args:
        count: what was asked for.
        least: 0 where that leaves the choice to a library.

    Raises:
        UserError: it is another number.
    """

    return check_int("threads", count, least, max(ALWAYS, PER_CORE * cores()))
