"""A run small enough for tests, as a process that can be killed or stopped.

``python -m tests.helpers.worker FOLDER STEPS SLOW`` is the run alone. With a fourth word it is a command of
``fewstep``, and with ``restoring`` for that word the restore of a checkpoint waits for a signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.core.types import BatchSlice
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.train.run import Run, TrainOptions


class Toy:
    """Two nets that take turns; now and then the second begins anew.

    The losses use both kinds of randomness, and the second net has some of its own.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            second = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2))
            self.nets: dict[str, Any] = {"first": torch.nn.Linear(4, 4), "second": second}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        first = Update("first", lambda batch, draw: self._losses("first", batch, draw))
        second = Update("second", lambda batch, draw: self._losses("second", batch, draw))
        anew = [InPlaceUpdate("second", self._anew)] if step % 5 == 4 else []
        return [*anew, first, second][: 1 + len(anew) + step % 2]

    def _anew(self, draw: StepRandom) -> Sequence[Any]:
        weight = self.nets["second"][0].weight
        weight.copy_(torch.randn(4, 4, generator=draw.torch) / 2)
        return [weight]

    def _losses(self, name: str, batch: Any, draw: StepRandom) -> Losses:
        noise = draw.noise(batch) * float(draw.rng.random())
        return {"square": (self.nets[name](batch + noise) - batch).square().mean()}


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def run_of(folder: Path, steps: int, slow: float = 0.0, **options: Any) -> Run:
    def batches(step: int, share: BatchSlice) -> torch.Tensor:
        time.sleep(slow)
        return batch_of(step)[share.slice_of(8)]

    settings: dict[str, Any] = {"warmup": min(1.0, 2 / steps), "decay": 0.0, "save_minutes": 0.0} | options
    of_run = {
        name: settings.pop(name) for name in ("score", "metric", "higher", "preview") if name in settings
    }
    return Run(
        "toy", folder, Toy(), batches, TrainOptions(steps, 1e-2, **settings), {"recipe": "toy"}, **of_run
    )


def toy(folder: Path, steps: int, slow: float) -> None:
    """Train as a command."""
    from fewstep.train.trainer import train

    train(run_of(folder, steps, slow, save_minutes=60.0))


def wait_within_restore() -> None:
    from fewstep.train import checkpoint_storage

    real = checkpoint_storage.read_bytes

    def read(path: Path, most: int, start: int = 0) -> bytearray:
        if path.suffix == ".distcp":
            (path.parents[2] / "restoring").touch()
            time.sleep(60)
        return real(path, most, start)

    checkpoint_storage.read_bytes = read


if __name__ == "__main__":
    from fewstep.cli import app as cli

    if sys.argv[4:] == ["restoring"]:
        wait_within_restore()
    if sys.argv[4:]:
        cli.COMMANDS["toy"] = ("tests.helpers.worker:toy", "Train.")
        sys.argv = ["fewstep", "toy", *sys.argv[1:4]]
        cli.main()
    from fewstep.train.trainer import train

    train(run_of(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
