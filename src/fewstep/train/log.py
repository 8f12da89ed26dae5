"""The log of a run: JSON lines, TensorBoard, contact sheets, and a line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from fewstep.files import write
from fewstep.train import Options


class Log:
    """Writes into the run's folder; opened again after a resume it goes on."""

    def __init__(self, folder: Path, name: str, about: dict[str, Any], step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "run.json", json.dumps(about, indent=1, default=str).encode())
        self._folder, self._name = folder, name
        self._lines = (folder / "log.jsonl").open("a")
        self._board: Any = None
        self._sums: dict[str, float] = defaultdict(float)
        self._since, self._from = time.monotonic(), step

    def write(self, step: int, figures: dict[str, float], options: Options) -> None:
        """Means of the figures since the last line, every ``log_every`` steps."""
        for name, value in figures.items():
            self._sums[name] += value
        if step % options.log_every and step != options.steps:
            return
        many, now = step - self._from, time.monotonic()
        line = {name: total / many for name, total in self._sums.items()}
        speed = many / max(1e-9, now - self._since)
        self._lines.write(json.dumps({"step": step, "time": time.time(), "steps_per_s": speed} | line) + "\n")
        self._lines.flush()
        for name, value in line.items():
            self._tensorboard().add_scalar(name, value, step)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
        left = (options.steps - step) / speed / 60
        print(
            f"{self._name} {step}/{options.steps}  {shown}  {speed:.2f}/s  {left:.0f} min left",
            file=sys.stderr,
        )
        self._sums.clear()
        self._since, self._from = now, step

    def sheet(self, step: int, image: Any) -> None:
        """Keep a contact sheet as ``sheets/STEP.png``."""
        (self._folder / "sheets").mkdir(exist_ok=True)
        image.save(self._folder / "sheets" / f"{step:07d}.png")

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def _tensorboard(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"))
        return self._board
