"""``fewstep ablate pocket``: compare methods with the same warm start, data, seeds and compute.

Each cell of the table is a ``fewstep distill`` in its own process, so that its memory is measured alone and
it can be repeated alone. One ``fewstep evaluate`` measures all of them. Finished cells are skipped, and
interrupted ones resume.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.core import atomic, json_io, schedule
from fewstep.core.cpu import threads as check_threads
from fewstep.core.progress import Progress, emit, say
from fewstep.core.types import UserError
from fewstep.core.validate import require_positive
from fewstep.data.teacher_samples import manifest
from fewstep.experiments.grid import ROWS, Cell, Row
from fewstep.experiments.report import document, read_results
from fewstep.experiments.subprocesses import ProcessGroup, Task, counted, run_training
from fewstep.modules.timestep_experts import split_grid
from fewstep.pocket.evaluation_inputs import check_evaluation_inputs


@dataclass(frozen=True)
class _Machine:
    """The keys of ``run.json`` that describe the machine of a run."""

    device: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict[str, str | None])


def ablate(
    *,
    teacher: str = "models/pocket-teacher",
    samples: Path = Path("data/teacher-samples"),
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("runs/ablate"),
    report: Path | None = None,
    student_steps: tuple[int, ...] = (4, 2),
    seeds: int = 3,
    passes: int = 4000,
    warm_start_steps: int = 400,
    warm_start_lr: float = 3e-4,
    batch_size: int = 16,
    lr: float = 1e-4,
    teacher_steps: int = 28,
    rows: tuple[str, ...] = (),
    prompts: int = 100,
    images_per_prompt: int = 2,
    scenes: int = 60,
    detector: Path = Path("models/scene-detector"),
    data: Path = Path("data/stickers"),
    jobs: int = 1,
    threads: int = 0,
    device: str = "auto",
) -> None:
    """Compare all methods: train every cell from one warm start, evaluate, and write the table.

    Args:
        teacher: The teacher, a diffusers folder or a hub name.
        samples: Its samples with trajectories, of `fewstep sample-teacher --student-steps`.
        output: Folder of all runs; the same command resumes after a stop.
        report: The document to write. [default: results.md in the folder of --output]
        student_steps: Sampling steps of the students.
        seeds: Trainings per cell.
        passes: Compute of a training: forward passes per sample of the batch; a backward pass counts as two.
        warm_start_steps: Training steps of the warm start, which all students of the same steps share.
        warm_start_lr: Learning rate of the warm start.
        batch_size: Samples per training step.
        lr: Learning rate of students and proxies.
        teacher_steps: Sampling steps of the evaluated teacher; its guidance is that of the samples.
        rows: Names of rows of the table. [default: all]
        prompts: Prompts of single stickers to evaluate.
        images_per_prompt: Images per prompt.
        scenes: Prompts of scenes, one image each; a multiple of 12, or 0 for none.
        detector: Folder of the scene detector.
        data: Folder that `fewstep data stickers` filled.
        jobs: Trainings at once; several slow each other down, and the minutes in the table include that.
        threads: Torch threads of each training; 0 leaves torch's choice.
        device: auto, cpu or cuda.
    """
    require_positive(
        seeds=seeds,
        passes=passes,
        warm_start_steps=warm_start_steps,
        batch_size=batch_size,
        jobs=jobs,
        images_per_prompt=images_per_prompt,
    )
    check_threads(threads)
    selected = _select(rows)
    plan = manifest.read(samples)
    check_evaluation_inputs(data, detector, prompts, scenes)
    warm_starts = {steps: output / f"warm.{steps}" for steps in dict.fromkeys(student_steps)}
    cells = [
        Cell(row, steps, seed)
        for seed in range(seeds)
        for steps in warm_starts
        for row in selected
        if row.split is None or all(split_grid(schedule.grid(steps, plan.shift)))
    ]
    if not cells:
        raise UserError("nothing to compare: students of so few steps have no times to split")
    shared = ["--teacher", teacher, "--samples", str(samples), "--batch-size", str(batch_size)]
    machine = ["--device", device, "--threads", str(threads)]
    processes = ProcessGroup()
    progress = Progress()

    def training(folder: Path, own: Sequence[str]) -> Task:
        return partial(run_training, processes, folder, [*own, *shared], machine, threads)

    def warm_start(steps: int) -> list[str]:
        return [
            "trajectory",
            "--student-steps",
            str(steps),
            "--steps",
            str(warm_start_steps),
            "--lr",
            str(warm_start_lr),
        ]

    def run_tasks(stage: str, tasks: Sequence[Task], jobs: int) -> None:
        with progress:
            processes.all(counted(partial(progress, stage), tasks), jobs)

    with atomic.held(output, "filled with trainings"):
        tasks = [training(folder, warm_start(steps)) for steps, folder in warm_starts.items()]
        run_tasks("warm starts", tasks, jobs)
        trainings = [(cell, cell.arguments(passes, warm_starts[cell.steps] / "model", lr)) for cell in cells]
        run_tasks("trainings", [training(output / cell.name, own) for cell, own in trainings], jobs)
        table = [("warm start", steps, folder) for steps, folder in warm_starts.items()]
        table += [(cell.row.name, cell.steps, output / cell.name) for cell in cells]
        evaluation = ["evaluate", *(f"{folder / 'model'}@{steps}" for _, steps, folder in table)]
        evaluation += [
            "--teacher",
            f"{teacher}@{teacher_steps}" + ("" if plan.guidance is None else f"x{plan.guidance:g}"),
        ]
        evaluation += ["--prompts", str(prompts), "--seeds", str(images_per_prompt), "--scenes", str(scenes)]
        evaluation += ["--detector", str(detector), "--data", str(data), "-o", str(output / "measured")]
        run_tasks("evaluation", [partial(_evaluate, processes, evaluation, threads)], 1)
        results = read_results(output / "measured" / "results.json")
        command = [
            "fewstep",
            "ablate",
            "pocket",
            "--teacher",
            teacher,
            "--samples",
            str(samples),
            "--output",
            str(output),
        ]
        report = report or output / "results.md"
        command += ["--report", str(report)]
        command += [word for steps in warm_starts for word in ("--student-steps", str(steps))]
        command += [
            "--seeds",
            str(seeds),
            "--passes",
            str(passes),
            "--warm-start-steps",
            str(warm_start_steps),
            "--warm-start-lr",
            str(warm_start_lr),
        ]
        command += ["--batch-size", str(batch_size), "--lr", str(lr), "--teacher-steps", str(teacher_steps)]
        command += [word for name in rows for word in ("--rows", name)]
        command += ["--prompts", str(prompts), "--images-per-prompt", str(images_per_prompt)]
        command += ["--scenes", str(scenes)]
        command += ["--detector", str(detector), "--data", str(data), "--jobs", str(jobs), *machine]
        facts = {
            "compute": f"{passes} passes per sample, batches of {batch_size}, learning rate {lr:g}, "
            f"warm start of {warm_start_steps} training steps",
            "machine": _machine(output / f"warm.{cells[0].steps}"),
            "jobs": str(jobs),
            "command": shlex.join(command),
        }
        atomic.write(report, document(table, results, facts).encode())
        emit(str(report))


def _evaluate(processes: ProcessGroup, arguments: Sequence[str], threads: int) -> None:
    say("evaluating")
    processes.run("fewstep evaluate", arguments, threads=threads)


def _select(names: Sequence[str]) -> list[Row]:
    """Return the rows of these names, or all if there are none.

    Raises:
        UserError: there is no such row.
    """
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise UserError(f"--rows {name}: there is none; rows are {'; '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def _machine(folder: Path) -> str:
    """Return device and torch version of a run."""
    record = json_io.read(folder / "run.json", _Machine, python=True)
    return f"{record.device}, torch {record.versions.get('torch')}"
