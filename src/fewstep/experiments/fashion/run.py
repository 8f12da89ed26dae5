"""Run the benchmark: what is missing is made, cells without a result file are run, tables are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.core import atomic, json_io
from fewstep.core.progress import Progress, say
from fewstep.core.types import UserError
from fewstep.experiments.fashion import report as reports
from fewstep.experiments.fashion.cells import (
    Cell,
    is_measured,
    measure_student,
    read_results,
    run_cell,
    write_result,
)
from fewstep.experiments.fashion.gradient import PAIRS, GradientCell, run_gradient
from fewstep.experiments.fashion.options import FashionOptions
from fewstep.experiments.fashion.preparation import Benchmark
from fewstep.experiments.fashion.protocol import SWEEP, Protocol
from fewstep.experiments.fashion.rows import MAIN, PRIMARY, Row, factorial, own_row, select
from fewstep.experiments.fashion.split import run_split
from fewstep.experiments.subprocesses import ProcessGroup, Task, counted

REFERENCE = "DMD, shared times, path"
"""The row whose compute of all updates is the equal compute of the others."""

FLASH_ROW = "flash, shared times, path, heads"
"""The row whose rate the experiment on split fine-tuning has."""

EXTENSIONS = 2
"""How often the rates of a sweep are extended where the best one is the smallest or the largest."""

WARM_START, TEACHER = "warm start", "teacher"
FACTORIAL_RATE, FACTORIAL_UPDATES, FACTORIAL_REPLICATES = 1e-4, 200, 2


def run(options: FashionOptions) -> Path:
    """Run the parts of the benchmark that are asked for, and return the document with the tables.

    Raises:
        UserError: a training failed, or the result files are of another protocol.
        Stop: after a signal; the same options continue.
    """
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    protocol = Protocol(
        images=options.images,
        samples=options.samples,
        warm_updates=options.warm_start_steps,
        updates=options.updates,
        sweep_updates=options.sweep_updates,
        batch=options.batch_size,
    )
    output, part, replicates = options.output, options.part, range(options.replicates)
    own_rows = tuple(map(own_row, options.row))
    rows = select((*PRIMARY, *own_rows), options.only)
    results = options.results or output / "results"
    processes = ProcessGroup()
    benchmark = Benchmark(
        output,
        options.data,
        output / "judge",
        str(output / "teacher" / "model"),
        protocol,
        options.device,
        options.threads,
        processes.check,
    )
    progress = Progress()

    def run_tasks(stage: str, tasks: Sequence[Task], jobs: int = options.jobs) -> None:
        with progress:
            processes.all(counted(partial(progress, stage), tasks), jobs)

    with atomic.held(output, "filled with trainings"):
        run_tasks("data, judge and teacher", [partial(_foundations, processes, benchmark, options)], 1)
        results.mkdir(parents=True, exist_ok=True)
        run_tasks("the teacher's figures", [partial(_measure_teacher, benchmark, results)], 1)
        run_tasks("the teacher's images", [benchmark.prepare_views], 1)
        used = [SWEEP, *replicates]
        run_tasks("teacher samples", [partial(benchmark.make_samples, processes, each) for each in used])
        student_steps = [4, *((2, 1) if "few-steps" in part else ())]
        warm = [(steps, each) for steps in student_steps for each in used]
        run_tasks("warm starts", [partial(benchmark.make_warm_start, processes, *each) for each in warm])
        run_tasks("warm starts measured", [partial(_measure_warm_start, benchmark, results, *each)
                                           for each in warm if each[1] != SWEEP])  # fmt: skip
        cells = partial(run_cell, processes, benchmark, results=results)
        for steps in student_steps:
            chosen = rows if steps == 4 else tuple(each for each in rows if each.name in MAIN)
            if steps == 4 and "primary" not in part:
                continue
            rates = _choose_rates(
                results,
                chosen,
                steps,
                protocol,
                lambda sweep, at=steps: run_tasks(
                    f"rates, {at} steps", [partial(cells, each) for each in sweep]
                ),
            )
            lengths = _lengths(results, chosen, steps, protocol)
            tables = [
                Cell(each, steps, replicate, rates[each.name], *lengths[each.name])
                for replicate in replicates
                for each in chosen
            ]
            run_tasks(f"students of {steps} steps", [partial(cells, each) for each in tables])
        if "split" in part:
            rate = _tabled_rate(results, FLASH_ROW)
            split = partial(run_split, processes, benchmark, rate=rate, results=results)
            run_tasks("split fine-tuning", [partial(split, replicate=each) for each in replicates])
        if "gradient" in part:
            gradients = [GradientCell(*pair, each) for each in replicates for pair in PAIRS]
            measure = partial(run_gradient, processes, benchmark, results=results)
            run_tasks("gradients", [partial(measure, each) for each in gradients])
        if "factorial" in part:
            own = [
                Cell(each, 4, replicate, FACTORIAL_RATE, FACTORIAL_UPDATES, (FACTORIAL_UPDATES,))
                for replicate in replicates[:FACTORIAL_REPLICATES]
                for each in factorial()
            ]
            run_tasks("factorial", [partial(cells, each) for each in own])
        names = [each.name for each in (*PRIMARY, *own_rows)]
        return write_report(results, names, output / "results.md")


def write_report(results: Path, rows: Sequence[str], path: Path) -> Path:
    """Write the tables of the result files, and return the path of the document."""
    records = read_results(results)
    names = [WARM_START, *rows]
    sections: list[str] = ["# Distillation methods on Fashion-MNIST\n"]
    many = Protocol.teacher_steps
    teacher = reports.table(records, [TEACHER], many, WARM_START)
    sections.append(f"## The teacher, {many} guided steps\n\n{teacher}\n")
    for steps in sorted({each["made_of"]["student_steps"] for each in records} - {many}, reverse=True):
        last = reports.table(records, names, steps, WARM_START)
        sections.append(f"## Students of {steps} steps, all updates\n\n{last}\n")
        sections.append(f"### Along the training\n\n{reports.curves(records, rows, steps)}\n")
    if split := reports.split_table(records):
        sections.append(f"## Split fine-tuning\n\n{split}\n")
    if gradients := reports.gradient_table(records):
        sections.append(f"## The gradient\n\n{gradients}\n")
    own = [each.name for each in factorial()]
    if any(each["made_of"]["row"] in own for each in records):
        sections.append(f"## Factorial\n\n{reports.table(records, own, 4, WARM_START)}\n")
    atomic.write(path, "\n".join(sections).encode())
    return path


def _foundations(processes: ProcessGroup, benchmark: Benchmark, options: FashionOptions) -> None:
    """Make data, judge and teacher where they are missing."""
    if not (benchmark.data / "train").is_dir():
        processes.run("fewstep data fashion", ["data", "fashion", "--output", str(benchmark.data)])
    for name, folder, steps in (
        ("fashion-judge", benchmark.judge_folder, options.judge_steps),
        ("fashion-teacher", benchmark.output / "teacher", options.teacher_steps),
    ):
        if (folder / "model").is_dir():
            continue
        say(name)
        arguments = ["train", name, "--data", str(benchmark.data), "--output", str(folder)]
        arguments += ["--steps", str(steps), *benchmark.machine]
        processes.run(name, arguments, threads=benchmark.threads)


def _measure_teacher(benchmark: Benchmark, results: Path) -> None:
    """Write the figures of the guided teacher, in its own number of steps and in four."""
    from fewstep.families.common import fingerprint
    from fewstep.fashion.measures import as_json, measure

    weights, protocol = fingerprint(benchmark.family.net), benchmark.protocol
    for steps in (protocol.teacher_steps, 4):
        path = results / f"teacher.{steps}.json"
        made_of = {"row": TEACHER, "student_steps": steps, "replicate": 0, "choice": False}
        made_of |= {"teacher": weights, "guidance": protocol.guidance}
        made_of |= {"judge_accuracy": benchmark.judge_accuracy}
        if is_measured(path, made_of):
            continue
        samples = benchmark.sample_teacher(protocol.images, steps=steps)
        figures = as_json(measure(benchmark.viewer(samples.images), samples.labels, benchmark.real, None))
        point = {"update": 0, "images": protocol.images, "figures": figures}
        write_result(path, {"made_of": made_of, "curve": [point]})


def _measure_warm_start(benchmark: Benchmark, results: Path, steps: int, replicate: int) -> None:
    """Write the figures of a warm start."""
    from fewstep.families.common import fingerprint
    from fewstep.pipeline.loading import load_family

    path = results / f"warm-start.{steps}.{replicate}.json"
    made_of = {"row": WARM_START, "student_steps": steps, "replicate": replicate, "choice": False}
    made_of |= {"teacher": fingerprint(benchmark.family.net)}
    if is_measured(path, made_of):
        return
    family = load_family(str(benchmark.warm_start(steps, replicate) / "model"))
    figures = measure_student(benchmark, family, steps, count=benchmark.protocol.images)
    point = {"update": 0, "images": benchmark.protocol.images, "figures": figures}
    write_result(path, {"made_of": made_of, "curve": [point]})


def _sweep_cell(row: Row, steps: int, rate: float, protocol: Protocol) -> Cell:
    updates = protocol.sweep_updates
    return Cell(row, steps, SWEEP, rate, updates, (updates,), choice=True)


def _choose_rates(
    results: Path,
    rows: Sequence[Row],
    steps: int,
    protocol: Protocol,
    run_cells: Callable[[Sequence[Cell]], None],
) -> dict[str, float]:
    """Run the sweep, extend it where the best rate is at an end, and return the best rate by row."""
    tried: dict[str, tuple[float, ...]] = {row.name: row.rates for row in rows}
    best: dict[str, float] = {}
    for _ in range(1 + EXTENSIONS):
        run_cells([_sweep_cell(row, steps, rate, protocol) for row in rows for rate in tried[row.name]])
        best = _best_rates(results, rows, steps, protocol, tried)
        tried = {name: with_neighbour(rates, best[name]) for name, rates in tried.items()}
    return best


def _best_rates(
    results: Path,
    rows: Sequence[Row],
    steps: int,
    protocol: Protocol,
    tried: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Return the rate with the smallest Fréchet distance in the sweep, by row."""
    best: dict[str, float] = {}
    for row in rows:
        distances: dict[float, float] = {}
        for rate in tried[row.name]:
            cell = _sweep_cell(row, steps, rate, protocol)
            record = json_io.read(results / f"{cell.name}.json", dict[str, Any])
            distances[rate] = reports.value(record, "frechet")
        best[row.name] = min(distances, key=lambda rate: distances[rate])
    return best


def with_neighbour(rates: Sequence[float], best: float) -> tuple[float, ...]:
    """Return the rates, with the next one beyond where the best is the smallest or the largest.

    Rates alternate between 1 and 3 times a power of ten.
    """
    ordered = sorted(rates)
    if best not in (ordered[0], ordered[-1]):
        return tuple(ordered)
    grid = sorted(factor * 10.0**power for power in range(-8, 0) for factor in (1, 3))
    place = min(range(len(grid)), key=lambda index: abs(math.log(grid[index] / best)))
    beyond = grid[place - 1] if best == ordered[0] else grid[place + 1]
    return tuple(sorted({*ordered, float(f"{beyond:g}")}))


def _tabled_rate(results: Path, row: str) -> float:
    """Return the rate of a row in the primary table.

    Raises:
        UserError: the row has no result yet.
    """
    found = reports.replicates(read_results(results), row, 4)
    if not found:
        raise UserError(f"{row} has no result yet: run --part primary first")
    return float(next(iter(found.values()))["made_of"]["rate"])


def _lengths(
    results: Path, rows: Sequence[Row], steps: int, protocol: Protocol
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return updates and points of each row: those of the protocol, and those of equal compute."""
    passes: dict[str, float] = {}
    for row in rows:
        cell = _sweep_cell(row, steps, row.rates[0], protocol)
        passes[row.name] = json_io.read(results / f"{cell.name}.json", dict[str, Any])["passes"]
    if REFERENCE not in passes:
        return {row.name: (protocol.updates, (protocol.updates,)) for row in rows}
    budget = protocol.updates * passes[REFERENCE]
    lengths: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, each in passes.items():
        unit = protocol.keep_every
        equal = unit * max(1, round(budget / each / unit))
        points = {equal, protocol.updates, unit * (2 * protocol.updates // (3 * unit))} - {0}
        lengths[name] = (max(equal, protocol.updates), tuple(sorted(points)))
    return lengths
