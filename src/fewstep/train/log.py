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
from typing import TYPE_CHECKING, TextIO

from fewstep import __version__
from fewstep.core import json_io
from fewstep.core.atomic import replacing_file, write
from fewstep.train.distributed import world
from fewstep.train.run import SaveableImage, TrainOptions

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


MOST_BYTES = 2**28
"""Largest size of a log; a million lines have less."""
_HALF_LINE = re.compile(rb"\{[ -~]*(?<!\})")
"""The start of a line, which a process leaves if it is killed while it writes; ``json`` writes ASCII."""


class Log:
    """Writes the log into the run's folder; a resumed run continues it.

    Lines of steps after the last checkpoint are dropped, because those steps are repeated. Only the first
    process writes.
    """

    def __init__(self, folder: Path, name: str, record: Mapping[str, object], step: int) -> None:
        self._folder, self._name, self._start = folder, name, step
        self.earlier: list[dict[str, float]] = []
        """The lines of an interrupted run, up to the step at which this one resumes."""
        self._file: TextIO | None = None
        if world().first:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "run.json", json.dumps(record, indent=1, default=str).encode())
            self.earlier = _until(folder / "log.jsonl", step)
            self._file = (folder / "log.jsonl").open("a")
        self._board: SummaryWriter | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._since, self._from = time.monotonic(), step

    def write(
        self, step: int, figures: Mapping[str, float], options: TrainOptions
    ) -> dict[str, float] | None:
        """Collect the figures of a step; every ``log_every`` steps write and return a line of their means.

        The mean of a figure is taken over the steps that have it.
        """
        for name, value in figures.items():
            self._sums[name] += value
            self._counts[name] += 1
        if step % options.log_every and step != options.steps:
            return None
        steps, now = step - self._from, time.monotonic()
        line = {name: total / self._counts[name] for name, total in self._sums.items()}
        speed = steps / max(1e-9, now - self._since)
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
        """Write a line of a step's scores, unless an earlier run wrote it."""
        if figures and not any(
            line["step"] == step and figures.keys() <= line.keys() for line in self.earlier
        ):
            self._put(step, figures)
            if world().first:
                shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
                print(f"{self._name} {step}  {shown}", file=sys.stderr)

    def sheet(self, step: int, image: SaveableImage) -> None:
        """Write a contact sheet as ``sheets/STEP.png``."""
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

    def _tensorboard(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._start + 1 if self.earlier else None
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge)
        return self._board


def _until(path: Path, step: int) -> list[dict[str, float]]:
    """Return the lines up to a step; remove later lines and a half-written last line from the file.

    Raises:
        UserError: another line is no line of a log; the file stays as it is.
    """
    if not path.exists():
        return []
    *lines, rest = json_io.read_bytes(path, MOST_BYTES).split(b"\n")
    if rest and not _HALF_LINE.fullmatch(rest):
        lines.append(rest)  # complete, or no line of a log
    parsed: list[dict[str, float]] = [
        json_io.parse(line, dict[str, int | float], f"{path}, line {number},", python=True)
        for number, line in enumerate(lines, 1)
    ]
    kept = [line for line in parsed if line.get("step", math.inf) <= step]
    write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def environment(device: str) -> dict[str, object]:
    """Return versions, device and number of processes of a run, for ``run.json``."""
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
    """Return the commit of the source, if it lies in a clone of the repository."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
