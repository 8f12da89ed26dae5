"""The options of ``fewstep ablate fashion``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.core.cpu import threads as check_threads
from fewstep.core.validate import require_positive

Part = Literal["primary", "few-steps", "split", "gradient", "factorial"]


@Parameter(name="*")
@dataclass(frozen=True)
class FashionOptions:
    """The options of the benchmark.

    Attributes:
        output: Folder of all runs, and of the tables, `results.md`.
        results: Folder of the result files, one per cell. [default: OUTPUT/results]
        data: The data set; it is made if it is not there.
        part: What is measured: primary, few-steps, split, gradient or factorial. May be given several times.
        only: Names of rows; the others are left out.
        row: A row of your own, NAME=METHOD OPTIONS, where METHOD may be an import path.
        replicates: Independent repetitions: teacher samples, warm start and seed.
        updates: Updates of each method.
        sweep_updates: Updates per rate in the choice of the learning rate.
        warm_start_steps: Updates of a warm start.
        samples: Teacher samples of a replicate.
        images: Images per measurement.
        batch_size: Samples per update.
        teacher_steps: Training steps of the teacher, if there is none in OUTPUT/teacher.
        judge_steps: Training steps of the judge, if there is none in OUTPUT/judge.
        jobs: Cells at once.
        threads: Torch threads of each process; 0 leaves torch's choice. Figures depend on it by rounding.
        device: auto, cpu or cuda.

    Raises:
        UserError: a number is out of its range.
    """

    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("runs/fashion")
    results: Path | None = None
    data: Path = Path("data/fashion")
    part: tuple[Part, ...] = ("primary",)
    only: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    replicates: int = 3
    updates: int = 600
    sweep_updates: int = 100
    warm_start_steps: int = 2000
    samples: int = 5000
    images: int = 10_000
    batch_size: int = 32
    teacher_steps: int = 14_000
    judge_steps: int = 2500
    jobs: int = 1
    threads: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        numbers = ("replicates", "updates", "sweep_updates", "warm_start_steps", "samples", "images")
        others = ("batch_size", "teacher_steps", "judge_steps", "jobs")
        require_positive(**{name: getattr(self, name) for name in (*numbers, *others)})
        check_threads(self.threads)


DEFAULT = FashionOptions()
