"""One cell of a table: a training, and the figures of its student along it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import atomic, json_io
from fewstep.core.types import UserError
from fewstep.experiments.fashion.preparation import Benchmark
from fewstep.experiments.fashion.protocol import TEST_SEED, VALIDATION_SEED
from fewstep.experiments.fashion.rows import Row
from fewstep.experiments.subprocesses import ProcessGroup, read_cost, run_training
from fewstep.fashion.measures import as_json, measure
from fewstep.fashion.sampling import sample

if TYPE_CHECKING:
    from fewstep.families.base import Family


@dataclass(frozen=True)
class Cell:
    """One training of a row.

    Attributes:
        row: the method.
        steps: the student's sampling steps.
        replicate: number of the teacher samples, the warm start and the seed.
        rate: learning rate.
        updates: updates of the method.
        points: updates at which the student is measured with all images; at others with fewer.
        choice: whether the cell serves a choice: it is then measured against training images.
    """

    row: Row
    steps: int
    replicate: int
    rate: float
    updates: int
    points: tuple[int, ...]
    choice: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's folder and of its result file."""
        return f"{self.row.slug}.{self.steps}.{self.replicate}.{self.rate:g}.{self.updates}"

    def made_of(self, benchmark: Benchmark) -> dict[str, Any]:
        """Return everything that the figures depend on, without paths."""
        return measured_alike(
            benchmark,
            row=self.row.name,
            command=list(self.row.command),
            start=self.row.start,
            student_steps=self.steps,
            replicate=self.replicate,
            rate=self.rate,
            updates=self.updates,
            points=list(self.points),
            choice=self.choice,
        )

    def arguments(self, benchmark: Benchmark) -> list[str]:
        """Return the arguments of ``fewstep distill``."""
        protocol = benchmark.protocol
        words = [*self.row.command, "--teacher", benchmark.teacher]
        words += ["--samples", str(benchmark.samples(self.replicate))]
        if self.row.start == "warm":
            words += ["--init", str(benchmark.warm_start(self.steps, self.replicate) / "model")]
        words += ["--student-steps", str(self.steps), "--steps", str(self.updates)]
        words += ["--batch-size", str(protocol.batch), "--lr", f"{self.rate:g}"]
        words += [
            "--seed",
            str(self.replicate),
            "--warmup",
            f"{min(1.0, protocol.rising / self.updates):.6g}",
        ]
        return [*words, "--decay", "0", "--precision", "fp32", "--keep-every", str(protocol.keep_every)]


def measured_alike(benchmark: Benchmark, **facts: Any) -> dict[str, Any]:
    """Return facts of a cell with those that all cells share: protocol, teacher and judge."""
    from fewstep.families.common import fingerprint

    protocol = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(benchmark.protocol).items()
    }
    teacher, judge = fingerprint(benchmark.family.net), fingerprint(benchmark.viewer.judge)
    return facts | {"protocol": protocol, "teacher": teacher, "judge": judge}


def is_measured(path: Path, made_of: Mapping[str, Any]) -> bool:
    """Return whether a result file is there.

    Args:
        path: of the result file.
        made_of: the facts that it must have.

    Raises:
        UserError: it has others.
    """
    if not path.exists():
        return False
    if json_io.read(path, dict[str, Any])["made_of"] != made_of:
        raise UserError(f"{path} was measured with other options; move it away to measure again")
    return True


def write_result(path: Path, record: Mapping[str, Any]) -> None:
    """Write a result file."""
    atomic.write(path, (json.dumps(record, indent=1) + "\n").encode())


def run_cell(processes: ProcessGroup, benchmark: Benchmark, cell: Cell, results: Path) -> None:
    """Train a cell and measure its student, unless its result file exists.

    The training's folder is deleted once the figures are written.

    Args:
        processes: runs the training.
        benchmark: what cells share.
        cell: the cell.
        results: folder of result files.

    Raises:
        UserError: the training failed, or the result file is of another protocol.
    """
    path, made_of = results / f"{cell.name}.json", cell.made_of(benchmark)
    if is_measured(path, made_of):
        return
    folder = benchmark.output / "cells" / cell.name
    run_training(processes, folder, cell.arguments(benchmark), benchmark.machine, benchmark.threads)
    cost = read_cost(folder / "cost.json")
    started = time.monotonic()
    record = {
        "made_of": made_of,
        "curve": _curve(benchmark, cell, folder),
        "passes": _passes(folder),
        "seconds": round(cost.seconds, 1),
        "bytes": cost.bytes,
        "measuring_seconds": round(time.monotonic() - started, 1),
        "interrupted": cost.begun - 1,
    }
    write_result(path, record)
    shutil.rmtree(folder)


def _passes(folder: Path) -> float:
    """Return the passes per sample of an update, which the log of the training counts."""
    lines = [line for path in folder.rglob("log.jsonl") for line in path.read_text().splitlines()]
    counts = [found["passes"] for line in lines if "passes" in (found := json.loads(line))]
    return round(sum(counts) / len(counts), 3)


def _curve(benchmark: Benchmark, cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the students that were kept, by update."""
    from safetensors.torch import load_file

    from fewstep.pipeline.loading import load_family

    family = load_family(str(folder / "model"))
    kept = {int(path.stem): path for path in folder.rglob("students/*.safetensors")}
    protocol, curve = benchmark.protocol, list[dict[str, Any]]()
    for update in sorted({*cell.points, *protocol.curve} & kept.keys()):
        family.net.load_state_dict(load_file(kept[update]))
        count = protocol.images if update in cell.points and not cell.choice else protocol.curve_images
        figures = measure_student(benchmark, family, cell.steps, count=count, choice=cell.choice)
        curve.append({"update": update, "images": count, "figures": figures})
    return curve


def measure_student(
    benchmark: Benchmark, family: Family, steps: int, *, count: int, choice: bool = False
) -> Mapping[str, Mapping[str, float]]:
    """Return the figures of a student without guidance.

    Args:
        benchmark: the judge, the real images and the teacher's.
        family: the student.
        steps: its solver steps.
        count: number of images.
        choice: compare with training images and from other noise, as choices do.
    """
    seed = VALIDATION_SEED if choice else TEST_SEED
    samples = sample(family, count=count, steps=steps, guidance=None, seed=seed, check=benchmark.check)
    real = benchmark.real_validation if choice else benchmark.real
    return as_json(measure(benchmark.viewer(samples.images), samples.labels, real, benchmark.teacher_views))


def read_results(results: Path) -> Sequence[dict[str, Any]]:
    """Return the records of all result files of a folder.

    Raises:
        UserError: a file is broken.
    """
    records: list[dict[str, Any]] = []
    for path in sorted(results.glob("*.json")):
        record: dict[str, Any] = json_io.read(path, dict[str, Any])
        json_io.convert(record, _Record, str(path))
        records.append(record)
    return records


@dataclass(frozen=True)
class _MadeOf:
    """The facts of a cell that tables read."""

    row: str
    student_steps: int
    replicate: int
    choice: bool
    rate: float | None = None


@dataclass(frozen=True)
class _Point:
    """The figures of a student at an update."""

    update: int
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Record:
    """The checked content of a result file."""

    made_of: _MadeOf
    curve: list[_Point]
