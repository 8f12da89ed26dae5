"""Progress lines and ranks of processes that sample a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fewstep.core.progress import duration, say
from fewstep.core.signals import check
from fewstep.core.types import UserError


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and its rank on this machine, which is its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0


def ranks_from_env(environment: Mapping[str, str]) -> Ranks:
    """Read the ranks that torchrun sets in the environment; without them this is the only process.

    Raises:
        UserError: they are no valid ranks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [environment.get(name, default) for name, default in zip(names, "010", strict=True)]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        raise UserError(
            f"RANK {values[0]} of WORLD_SIZE {values[1]} in the environment is not valid; unset both"
        )
    return Ranks(*map(int, values))


def progress_printer(every: float = 10.0) -> Callable[[int, int], None]:
    """Return a progress callback that prints counts, speed and time left, at most every ``every`` seconds."""
    started = last = time.monotonic()
    first: int | None = None

    def progress(done: int, total: int) -> None:
        nonlocal last, first
        check()
        now = time.monotonic()
        if first is None:  # samples of an earlier run do not count for the speed
            first = done
            if done:
                say(f"{done} of {total} samples are there")
        elif now - last >= every or done == total:
            last, speed = now, (done - first) / (now - started)
            left = duration((total - done) / speed)
            say(f"{done} of {total} samples, {speed:.2g} per second, {left} left")

    return progress
