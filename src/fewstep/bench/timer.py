"""Times the stages of a generation, also on a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


@dataclass
class StageTimer:
    """Seconds of the stages of one generation; a :class:`fewstep.core.sampling.StageRunner`."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Return ``work()``, and add its time to the stage ``name``."""
        begin = time.perf_counter()
        result = work()
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result


def cuda() -> ModuleType | None:
    """Return ``torch.cuda`` if this process uses it, else ``None``."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def synchronize() -> None:
    """Wait for the GPU, so that a stage's time does not include work of the stage before."""
    if used := cuda():
        used.synchronize()
