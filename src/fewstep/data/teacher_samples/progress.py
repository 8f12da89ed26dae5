"""Progress and ranks of processes that sample a teacher."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fewstep.core.progress import duration
from fewstep.core.signals import check
from fewstep.core.types import UserError


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this one is, and which GPU of its machine is its own."""

    rank: int = 0
    world: int = 1
    local: int = 0


def ranks_from_env(environment: Mapping[str, str]) -> Ranks:
    """What torchrun says in the environment; alone where it says nothing.

    Raises:
        UserError: it says what cannot be.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    said = [environment.get(name, default) for name, default in zip(names, "010", strict=True)]
    if not all(value.isdecimal() for value in said) or int(said[0]) >= int(said[1]):
        raise UserError(f"RANK {said[0]} of WORLD_SIZE {said[1]} in the environment cannot be; unset both")
    return Ranks(*map(int, said))


def progress_printer(every: float = 10.0) -> Callable[[int, int], None]:
    """A progress that prints a line of done, speed and time left, at most one in ``every`` seconds."""
    begun = last = time.monotonic()
    before: int | None = None

    def say(done: int, total: int) -> None:
        nonlocal last, before
        check()
        now = time.monotonic()
        if before is None:  # what an earlier run made says nothing of this one's speed
            before = done
            if done:
                print(f"fewstep: {done} of {total} samples are there", file=sys.stderr)
        elif now - last >= every or done == total:
            last, speed = now, (done - before) / (now - begun)
            left = duration((total - done) / speed)
            print(f"fewstep: {done} of {total} samples, {speed:.2g} a second, {left} left", file=sys.stderr)

    return say
