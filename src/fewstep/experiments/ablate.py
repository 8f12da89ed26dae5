"""``fewstep ablate``: every method on one teacher, one warm start, the same data, seeds and compute, in a
table.

Each cell is an ordinary ``fewstep distill`` in a process of its own, so that its memory is its own and
anybody can run it alone; all are measured by one ``fewstep evaluate``. What is done already is not done
again, and what was begun goes on.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.core import atomic, json_io, schedule
from fewstep.core.cpu import threads as counted_threads
from fewstep.core.progress import Progress, emit, say
from fewstep.core.types import UserError
from fewstep.core.validate import require_positive
from fewstep.data.teacher_samples import manifest
from fewstep.experiments.gradient_noise import FILE as NOISE_FILE
from fewstep.experiments.grid import MATCH, ROWS, Cell, Row
from fewstep.experiments.report import document, read_results
from fewstep.experiments.subprocesses import ProcessGroup, run_training
from fewstep.modules.timestep_experts import split_grid
from fewstep.pocket.assemble import check_evaluation_inputs

Task = Callable[[], None]


@dataclass(frozen=True)
class _Circumstances:
    """What ``run.json`` says of where a run took place."""

    device: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict[str, str | None])


def ablate(
    *,
    teacher: str = "models/pocket-teacher",
    samples: Path = Path("data/walks"),
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
    """Compare all methods: train every cell from one warm start, measure, and write the table.

    Args:
        teacher: The teacher, a diffusers folder or a hub name.
        samples: Its samples and walks, of `fewstep sample-teacher --student-steps`.
        output: Folder of all runs; stopped, the same command goes on.
        report: The document that is written. [default: results.md in the folder of --output]
        student_steps: Numbers of steps of the students.
        seeds: Trainings of each cell.
        passes: Compute of a training: passes of the net for a sample of each batch; one back counts as two.
        warm_start_steps: Updates of the warm start, which all students of as many steps share.
        warm_start_lr: Learning rate of the warm start.
        batch_size: Samples an update.
        lr: Learning rate of students and proxies.
        teacher_steps: Steps of the teacher that is measured; its guidance is that of the samples.
        rows: Names of rows of the table. [default: all]
        prompts: Prompts of single stickers that are measured.
        images_per_prompt: Pictures a prompt.
        scenes: Prompts of scenes, a picture each; a multiple of 12, or 0 for none.
        detector: Folder of what finds things in scenes.
        data: Folder that `fewstep data stickers` filled.
        jobs: Trainings at once; more than one slow each other down, and the minutes in the table say so.
        threads: Torch threads of each; 0 leaves torch's choice.
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
    counted_threads(threads)
    chosen = _chosen(rows)
    plan = manifest.read(samples)
    check_evaluation_inputs(data, detector, prompts, scenes)
    warms = {steps: output / f"warm.{steps}" for steps in dict.fromkeys(student_steps)}
    cells = [
        Cell(row, steps, seed)
        for seed in range(seeds)
        for steps in warms
        for row in chosen
        if row.split is None or all(split_grid(schedule.grid(steps, plan.shift)))
    ]
    if not cells:
        raise UserError("nothing is left to compare: students of so few steps have no times to split")
    shared = ["--teacher", teacher, "--samples", str(samples), "--batch-size", str(batch_size)]
    place = ["--device", device, "--threads", str(threads)]
    processes = ProcessGroup()
    progress = Progress()

    def training(folder: Path, own: Sequence[str]) -> Task:
        return partial(run_training, processes, folder, [*own, *shared], place, threads)

    def warming(steps: int) -> list[str]:
        return [
            "trajectory",
            "--student-steps",
            str(steps),
            "--steps",
            str(warm_start_steps),
            "--lr",
            str(warm_start_lr),
        ]

    def carry_out(stage: str, tasks: Sequence[Task], jobs: int) -> None:
        with progress:
            processes.all(_counted(partial(progress, stage), tasks), jobs)

    with atomic.held(output, "filled with trainings"):
        tasks = [training(folder, warming(steps)) for steps, folder in warms.items()]
        carry_out("warm starts", tasks, jobs)
        begun = [(cell, cell.arguments(passes, warms[cell.steps] / "model", lr)) for cell in cells]
        carry_out("trainings", [training(output / cell.name, own) for cell, own in begun], jobs)
        noise = output / f"noise.{cells[0].steps}"
        matching = any(row.method == "dmd" for row in chosen)
        if matching:
            (updates,) = Row("", "dmd", cost=MATCH).updates(passes, cells[0].steps).values()
            own = ["--steps", str(updates), "--init", str(warms[cells[0].steps] / "model"), "--lr", str(lr)]
            own += ["--student-steps", str(cells[0].steps)]
            task = partial(_noise, processes, noise, [*own, *shared], place, threads)
            carry_out("the gradient's noise", [task], 1)
        table = [("warm start", steps, folder) for steps, folder in warms.items()]
        table += [(cell.row.name, cell.steps, output / cell.name) for cell in cells]
        asked = ["evaluate", *(f"{folder / 'model'}@{steps}" for _, steps, folder in table)]
        asked += [
            "--teacher",
            f"{teacher}@{teacher_steps}" + ("" if plan.guidance is None else f"x{plan.guidance:g}"),
        ]
        asked += ["--prompts", str(prompts), "--seeds", str(images_per_prompt), "--scenes", str(scenes)]
        asked += ["--detector", str(detector), "--data", str(data), "-o", str(output / "measured")]
        carry_out("measuring", [partial(_measured, processes, asked, threads)], 1)
        results = read_results(output / "measured" / "results.json")
        typed = [
            "fewstep",
            "ablate",
            "--teacher",
            teacher,
            "--samples",
            str(samples),
            "--output",
            str(output),
        ]
        report = report or output / "results.md"
        typed += ["--report", str(report)]
        typed += [word for steps in warms for word in ("--student-steps", str(steps))]
        typed += [
            "--seeds",
            str(seeds),
            "--passes",
            str(passes),
            "--warm-start-steps",
            str(warm_start_steps),
            "--warm-start-lr",
            str(warm_start_lr),
        ]
        typed += ["--batch-size", str(batch_size), "--lr", str(lr), "--teacher-steps", str(teacher_steps)]
        typed += [word for name in rows for word in ("--rows", name)]
        typed += ["--prompts", str(prompts), "--images-per-prompt", str(images_per_prompt)]
        typed += ["--scenes", str(scenes)]
        typed += ["--detector", str(detector), "--data", str(data), "--jobs", str(jobs), *place]
        facts = {
            "compute": f"{passes} passes a sample, batches of {batch_size}, rate {lr:g}, "
            f"warm start of {warm_start_steps} updates",
            "machine": _machine(output / f"warm.{cells[0].steps}"),
            "jobs": str(jobs),
            "command": shlex.join(typed),
        }
        atomic.write(
            report, document(table, results, facts, noise / NOISE_FILE if matching else None).encode()
        )
        emit(str(report))


def _counted(progress: Callable[[int, int], None], tasks: Sequence[Task]) -> list[Task]:
    """Tasks that say how many of them are done."""
    done = count(1)
    progress(0, len(tasks))

    def carry_out(task: Task) -> None:
        task()
        progress(next(done), len(tasks))

    return [partial(carry_out, task) for task in tasks]


def _noise(
    processes: ProcessGroup, folder: Path, asked: Sequence[str], place: Sequence[str], threads: int
) -> None:
    """Measure the noise of the gradient, unless it was, by the same command."""
    note, typed = folder / "command.json", json.dumps(list(asked))
    if (folder / NOISE_FILE).exists() and note.exists() and note.read_text() == typed:
        return
    say(folder.name)
    processes.run(
        "fewstep gradient-noise", ["gradient-noise", *asked, *place, "-o", str(folder)], threads=threads
    )
    atomic.write(note, typed.encode())


def _measured(processes: ProcessGroup, asked: Sequence[str], threads: int) -> None:
    say("measuring")
    processes.run("fewstep evaluate", asked, threads=threads)


def _chosen(names: Sequence[str]) -> list[Row]:
    """The rows of these names; all where there are none.

    Raises:
        UserError: there is no such row.
    """
    known = [row.name for row in ROWS]
    for name in names:
        if name not in known:
            raise UserError(f"--rows {name}: there is none; rows are {'; '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def _machine(folder: Path) -> str:
    """What a run was trained on, as far as it says."""
    about = json_io.read(folder / "run.json", _Circumstances, python=True)
    return f"{about.device}, torch {about.versions.get('torch')}"
