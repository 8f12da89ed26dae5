"""``fewstep ablate``: every method on one teacher, one warm start, the same data, seeds and compute, in a
table.

Each cell is an ordinary ``fewstep distill`` in a process of its own, so that its memory is its own and
anybody can run it alone; all are measured by one ``fewstep evaluate``. What is done already is not done
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep import files
from fewstep.data.synthesis import plan as plans
from fewstep.recipes.parts import at_least_one
from fewstep.recipes.table import document
from fewstep.types import UserError


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what the table calls it.
        method: of ``fewstep distill``.
        options: of the method, as typed.
        cost: passes of a net that one update takes for a sample: (a step of the student's, besides). A pass
            back counts as two, a guided teacher as two.
        split: share of the compute that goes into split fine-tuning.
    """

    name: str
    method: str
    options: tuple[str, ...] = ()
    cost: tuple[int, int] = (0, 3)
    split: float = 0.0

    def updates(self, passes: int, steps: int) -> int:
        """How many updates ``passes`` allow a student of so many steps."""
        return max(1, round(passes / (self.cost[0] * steps + self.cost[1])))


MATCH = (1, 15 + 6)
"""Five updates of the proxy; the student's step there and back, the guided teacher, the proxy."""

RENOISED = ("--where", "renoise", "--anchor", "10", "--updates", "2")

FLASH = (4, 6 + 3 + 6 + 6 + 3)
"""Two updates of the proxy; the heads' features; matching; the walk there and back and its features; the
anchor."""

ROWS = (
    Row("trajectory", "trajectory"),
    Row("DMD2", "dmd", ("--where", "renoise", "--proxied", "estimates"), MATCH),
    Row("DMD, renoised, proxy on finals", "dmd", ("--where", "renoise", "--proxied", "finals"), MATCH),
    Row("DMD, shared times", "dmd", ("--where", "shared", "--proxied", "finals"), MATCH),
    Row("DMD, times shared freely", "dmd", ("--where", "shared-free", "--proxied", "finals"), MATCH),
    Row("DMD2 + SenseFlow's IDA", "dmd", ("--proxied", "estimates", "--follow", "0.98"), MATCH),
    Row("TDM", "tdm", (), MATCH),
    Row("LADD", "adversarial", (), (1, 10)),
    Row("LCM", "consistency", (), (0, 6)),
    Row("flash, renoised", "flash", ("--split", "0", *RENOISED), FLASH),
    Row("flash, renoised, split and merged", "flash", RENOISED, FLASH, split=0.3),
    Row("flash", "flash", ("--split", "0", "--updates", "2"), FLASH),
    Row("flash, split and merged", "flash", ("--updates", "2"), FLASH, split=0.3),
)


@dataclass(frozen=True)
class Cell:
    """One training: a row at a number of steps with a seed."""

    row: Row
    steps: int
    seed: int

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.row.name.lower())
        return f"{'-'.join(filter(None, words.split('-')))}.{self.steps}.{self.seed}"


def ablate(
    *,
    teacher: str = "models/pocket-teacher",
    synthetic: Path = Path("data/walks"),
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("runs/ablate"),
    report: Path = Path("docs/results.md"),
    student_steps: tuple[int, ...] = (4, 2),
    seeds: int = 3,
    passes: int = 4000,
    warm: int = 400,
    warm_lr: float = 3e-4,
    batch: int = 16,
    lr: float = 1e-4,
    teacher_steps: int = 28,
    rows: tuple[str, ...] = (),
    prompts: int = 100,
    pictures: int = 2,
    scenes: int = 60,
    data: Path = Path("data/stickers"),
    jobs: int = 1,
    threads: int = 0,
    device: str = "auto",
) -> None:
    """Compare all methods: train every cell from one warm start, measure, and write the table.

    Args:
        teacher: The teacher, a diffusers folder or a hub name.
        synthetic: Its samples and walks, of `fewstep synthesize --student-steps`.
        out: Folder of all runs; stopped, the same command goes on.
        report: The document that is written.
        student_steps: Numbers of steps of the students.
        seeds: Trainings of each cell.
        passes: Compute of a training: passes of the net for a sample of each batch; one back counts as two.
        warm: Updates of the warm start, which all students of as many steps share.
        warm_lr: Learning rate of the warm start.
        batch: Samples an update.
        lr: Learning rate of students and proxies.
        teacher_steps: Steps of the teacher that is measured; its guidance is that of the samples.
        rows: Names of rows of the table. [default: all]
        prompts: Prompts of single stickers that are measured.
        pictures: Pictures a prompt.
        scenes: Prompts of scenes, a picture each; a multiple of 12, or 0 for none.
        data: Folder that `fewstep data stickers` filled.
        jobs: Trainings at once.
        threads: Torch threads of each; 0 leaves torch's choice.
        device: auto, cpu or cuda.
    """
    at_least_one(seeds=seeds, passes=passes, warm=warm, batch=batch, jobs=jobs)
    unknown = [name for name in rows if name not in [row.name for row in ROWS]]
    if unknown:
        raise UserError(f"--rows {unknown[0]}: there is none; rows are {', '.join(row.name for row in ROWS)}")
    chosen = [row for row in ROWS if not rows or row.name in rows]
    shared = ["--teacher", teacher, "--synthetic", str(synthetic), "--batch", str(batch)]
    shared += ["--device", device, "--threads", str(threads)]
    for steps in student_steps:
        begin = ["--student-steps", str(steps), "--steps", str(warm), "--lr", str(warm_lr)]
        _trained(out / f"warm.{steps}", ["trajectory", *begin, *shared], threads)
    cells = [
        Cell(row, steps, seed)
        for seed in range(seeds)
        for steps in student_steps
        for row in chosen
        if not (row.split and steps < 3)
    ]

    def train(cell: Cell) -> None:
        begin = str(out / f"warm.{cell.steps}" / "model")
        own = ["--init", begin, "--student-steps", str(cell.steps), "--seed", str(cell.seed), "--lr", str(lr)]
        _trained(out / cell.name, [cell.row.method, *_updates(cell, passes), *own, *shared], threads)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, cells))
    measured = out / "measured"
    models = [_model(out / f"warm.{steps}", steps) for steps in student_steps]
    models += [_model(out / cell.name, cell.steps) for cell in cells]
    counts = ["--prompts", str(prompts), "--seeds", str(pictures), "--scenes", str(scenes)]
    guided = f"{teacher}@{teacher_steps}x{plans.read(synthetic).guidance or 1:g}"
    _fewstep(["evaluate", *models, "--teacher", guided, *counts, "--data", str(data), "-o", str(measured)])
    results = json.loads((measured / "results.json").read_text())
    facts = {
        "compute": f"{passes} passes a sample, batches of {batch}, rate {lr:g}, warm start of {warm} updates",
    }
    table = [(cell.row.name, cell.steps, out / cell.name) for cell in cells]
    table = [("warm start", steps, out / f"warm.{steps}") for steps in student_steps] + table
    files.write(report, document(table, results, facts).encode())
    print(report)


def _updates(cell: Cell, passes: int) -> Iterator[str]:
    """Options that spend a cell's compute."""
    row = cell.row
    if row.method == "flash":
        yield from ("--warm", "0")
    if row.split:
        # Of the updates of split fine-tuning each has a turn of either branch.
        both = Row("", "", cost=(row.cost[0] * 2, row.cost[1] * 2 - 9))
        yield from ("--split", str(both.updates(round(passes * row.split), cell.steps)))
    yield from ("--steps", str(row.updates(round(passes * (1 - row.split)), cell.steps)))
    yield from row.options


def _model(folder: Path, steps: int) -> str:
    return f"{folder / 'model'}@{steps}"


def _trained(folder: Path, arguments: Sequence[str], threads: int) -> None:
    """Carry out a training whose ``cost.json`` is not there yet, and write it: seconds and bytes."""
    note = folder / "cost.json"
    if note.exists():
        return
    print(f"fewstep: {folder.name}", file=sys.stderr)
    began = time.monotonic()
    memory = _fewstep(["distill", *arguments, "--out", str(folder)], threads)
    told = {"seconds": time.monotonic() - began, "bytes": memory, "command": list(arguments)}
    files.write(note, json.dumps(told, indent=1).encode())


def _fewstep(arguments: Sequence[str], threads: int = 0) -> int:
    """Run ``fewstep`` in a process of its own; the most memory that it held, bytes.

    Raises:
        UserError: it failed; its own last line is told.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    last = ""
    for line in process.stderr:
        last = line.strip() or last
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"fewstep {arguments[0]} {arguments[1]} failed: {last.removeprefix('fewstep: ')}")
    return usage.ru_maxrss * 1024
