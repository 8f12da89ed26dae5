"""Noise and bias of the gradient along a training, by score point and target of the proxy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core import json_io
from fewstep.experiments.fashion.cells import is_measured, measured_alike, write_result
from fewstep.experiments.fashion.preparation import Benchmark
from fewstep.experiments.gradient_noise import FILE
from fewstep.experiments.subprocesses import ProcessGroup

PAIRS = (("shared", "path"), ("shared", "finals"), ("shared-free", "path"), ("renoise", "finals"))
"""Score points and proxy targets that are measured."""

UPDATES, EVERY, DRAWS, REFERENCE_UPDATES, REFERENCE_DRAWS = 600, 200, 32, 300, 64
STEPS = 4
RATE = 1e-4


@dataclass(frozen=True)
class GradientCell:
    """A training along which the gradient is measured."""

    score_point: str
    proxy_target: str
    replicate: int

    @property
    def row(self) -> str:
        """Name of the row in the table."""
        return f"gradient, {self.score_point}, {self.proxy_target}"

    @property
    def name(self) -> str:
        """Name of the cell's folder and of its result file."""
        return f"gradient-{self.score_point}-{self.proxy_target}.{STEPS}.{self.replicate}"

    def options(self, benchmark: Benchmark) -> list[str]:
        """Return the options of the measurement, without paths."""
        words = ["--score-point", self.score_point, "--proxy-target", self.proxy_target]
        words += ["--steps", str(UPDATES), "--every", str(EVERY), "--draws", str(DRAWS)]
        words += ["--reference-updates", str(REFERENCE_UPDATES), "--reference-draws", str(REFERENCE_DRAWS)]
        words += ["--student-steps", str(STEPS), "--batch-size", str(benchmark.protocol.batch)]
        return [*words, "--lr", f"{RATE:g}", "--decay", "0", "--precision", "fp32"]


def run_gradient(processes: ProcessGroup, benchmark: Benchmark, cell: GradientCell, results: Path) -> None:
    """Measure the gradient along one training, unless the result file exists.

    Raises:
        UserError: the training failed, or the result file is of another protocol.
    """
    options = cell.options(benchmark)
    made_of = measured_alike(
        benchmark, row=cell.row, command=options, student_steps=STEPS, replicate=cell.replicate, choice=False
    )
    path, folder = results / f"{cell.name}.json", benchmark.output / "cells" / cell.name
    if is_measured(path, made_of):
        return
    words = ["gradient-noise", *options, "--teacher", benchmark.teacher, "--seed", str(cell.replicate)]
    words += ["--samples", str(benchmark.samples(cell.replicate)), "--output", str(folder)]
    words += ["--init", str(benchmark.warm_start(STEPS, cell.replicate) / "model"), *benchmark.machine]
    processes.run(cell.name, words, threads=benchmark.threads)
    measured = json_io.read(folder / FILE, dict[str, Any])["measured"]
    write_result(path, {"made_of": made_of, "measured": measured, "curve": []})
    shutil.rmtree(folder)
