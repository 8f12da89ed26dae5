"""The log of a run: JSON lines, TensorBoard, contact sheets, and a line on the terminal."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.core import json_io
from fewstep.core.atomic import replacing_file, write
from fewstep.train.distributed import world
from fewstep.train.run import TrainOptions

MOST_BYTES = 2**28
"""Of a log; a million lines have less."""
_HALF_LINE = re.compile(rb"\{[ -~]*(?<!\})")
"""The start of a line, as a process leaves it that is killed while it writes: ASCII, as ``json`` writes."""


class Log:
    """Writes into the run's folder; opened again after a resume it goes on.

    Lines of steps that a killed run had done and not saved are dropped: they will be done again. Of several
    processes the first writes.
    """

    def __init__(self, folder: Path, name: str, about: dict[str, Any], step: int) -> None:
        self._folder, self._name, self._start = folder, name, step
        self.earlier: list[dict[str, float]] = []
        """The lines of an interrupted run, up to the step where this one goes on."""
        self._file: Any = None
        if world().first:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "run.json", json.dumps(about, indent=1, default=str).encode())
            self.earlier = _until(folder / "log.jsonl", step)
            self._file = (folder / "log.jsonl").open("a")
        self._board: Any = None
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._since, self._from = time.monotonic(), step

    def write(
        self, step: int, figures: Mapping[str, float], options: TrainOptions
    ) -> dict[str, float] | None:
        """Means of the figures since the last line, every ``log_every`` steps; the line, where there is one.

        A figure that some steps lack is the mean over those that have it.
        """
        for name, value in figures.items():
            self._sums[name] += value
            self._counts[name] += 1
        if step % options.log_every and step != options.steps:
            return None
        many, now = step - self._from, time.monotonic()
        line = {name: total / self._counts[name] for name, total in self._sums.items()}
        speed = many / max(1e-9, now - self._since)
        self._sums.clear()
        self._counts.clear()
        self._since, self._from = now, step
        self._put(step, {"steps_per_s": speed} | line)
        if world().first:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            left = (options.steps - step) / speed / 60
            print(
                f"{self._name} {step}/{options.steps}  {shown}  {speed:.2f}/s  {left:.0f} min left",
                file=sys.stderr,
            )
        return line

    def score(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of its own for what was measured at this step, unless it is there from an earlier run."""
        if figures and not any(
            line["step"] == step and figures.keys() <= line.keys() for line in self.earlier
        ):
            self._put(step, figures)
            if world().first:
                told = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
                print(f"{self._name} {step}  {told}", file=sys.stderr)

    def sheet(self, step: int, image: Any) -> None:
        """Keep a contact sheet as ``sheets/STEP.png``."""
        if world().first:
            (self._folder / "sheets").mkdir(exist_ok=True)
            with replacing_file(self._folder / "sheets" / f"{step:07d}.png") as fresh:
                image.save(fresh)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _put(self, step: int, figures: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": time.time(), **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if name != "steps_per_s":
                self._tensorboard().add_scalar(name, value, step)

    def _tensorboard(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._start + 1 if self.earlier else None
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge)
        return self._board


def _until(path: Path, step: int) -> list[dict[str, float]]:
    """The lines up to a step; later ones, and one that a killed process left half written, leave the file.

    Raises:
        UserError: another line is none of a log. The file stays as it is.
    """
    if not path.exists():
        return []
    *lines, rest = json_io.read_bytes(path, MOST_BYTES).split(b"\n")
    if rest and not _HALF_LINE.fullmatch(rest):
        lines.append(rest)  # whole, or nothing that a log ever held
    told: list[dict[str, float]] = [
        json_io.parse(line, dict[str, int | float], f"{path}, line {number},", python=True)
        for number, line in enumerate(lines, 1)
    ]
    kept = [line for line in told if line.get("step", math.inf) <= step]
    write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def environment(device: str) -> dict[str, Any]:
    """Where and with what a run takes place, for ``run.json``."""
    import torch

    return {
        "versions": {"python": platform.python_version(), "fewstep": __version__}
        | {name: _version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "commit": _commit(),
        "processes": world().size,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source, where it lies in its own clone."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
