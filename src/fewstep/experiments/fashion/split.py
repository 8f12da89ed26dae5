"""Split fine-tuning and its merge against as many plain updates, and against more of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fewstep.core import atomic
from fewstep.experiments.fashion.cells import is_measured, measure_student, measured_alike, write_result
from fewstep.experiments.fashion.preparation import Benchmark
from fewstep.experiments.fashion.rows import flash_options
from fewstep.experiments.subprocesses import ProcessGroup, run_training

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the late branch. The paper's merge is 3 : 7."""

BEFORE = 400
"""Updates of the stage before."""

SPLIT_UPDATES, PLAIN_UPDATES = 200, 300
"""Updates of the split, and of plain fine-tuning, which is measured after 200 and after all."""

OPTIONS = ("--warm-start-steps", "0", *flash_options("shared", "path", "0"))
"""Options of ``fewstep distill flash`` in both."""

STEPS = 4
"""Sampling steps of the students: at this shift fewer have no times to split."""


@dataclass(frozen=True)
class SplitCell:
    """A stage of flash, and after it split or plain fine-tuning.

    Attributes:
        kind: of the fine-tuning.
        replicate: number of the teacher samples, the warm start and the seed.
        rate: learning rate.
    """

    kind: Literal["split", "plain"]
    replicate: int
    rate: float

    @property
    def name(self) -> str:
        """Name of the cell's folder and of its result file."""
        return f"fine-tuning-{self.kind}.{STEPS}.{self.replicate}.{self.rate:g}"

    def arguments(self, benchmark: Benchmark) -> list[str]:
        """Return the arguments of ``fewstep distill``."""
        updates = SPLIT_UPDATES if self.kind == "split" else PLAIN_UPDATES
        words = ["flash", *OPTIONS, "--teacher", benchmark.teacher]
        words += ["--samples", str(benchmark.samples(self.replicate))]
        words += ["--init", str(benchmark.warm_start(STEPS, self.replicate) / "model")]
        words += ["--student-steps", str(STEPS), "--steps", str(BEFORE), "--split-steps", str(updates)]
        words += ["--fine-tune", self.kind, "--batch-size", str(benchmark.protocol.batch)]
        words += ["--lr", f"{self.rate:g}", "--seed", str(self.replicate), "--decay", "0"]
        words += ["--precision", "fp32", "--keep-every", str(min(100, SPLIT_UPDATES))]
        return [*words, *(["--merge-ratio", "0.3"] if self.kind == "split" else [])]


def run_split(
    processes: ProcessGroup, benchmark: Benchmark, replicate: int, rate: float, results: Path
) -> None:
    """Train a replicate both ways from one stage before, and measure both, unless the result files exist.

    Raises:
        UserError: a training failed, or a result file is of another protocol.
    """
    before: Path | None = None
    for kind in ("split", "plain"):
        cell = SplitCell(kind, replicate, rate)
        path, folder = results / f"{cell.name}.json", benchmark.output / "cells" / cell.name
        made_of = measured_alike(
            benchmark, row=f"fine-tuning, {kind}", command=["flash", *OPTIONS], student_steps=STEPS,
            replicate=replicate, rate=rate, updates=[BEFORE, SPLIT_UPDATES, PLAIN_UPDATES], choice=False,
        )  # fmt: skip
        if is_measured(path, made_of):
            continue
        stage = folder / "2-flash"
        if before is not None and not stage.exists():  # the stage before is the same
            with atomic.replacing_folder(stage) as fresh:
                shutil.copytree(before, fresh, dirs_exist_ok=True)
        run_training(processes, folder, cell.arguments(benchmark), benchmark.machine, benchmark.threads)
        measured = _ratios(benchmark, folder) if kind == "split" else _plain(benchmark, folder)
        write_result(path, {"made_of": made_of} | measured)
        before = stage
    for kind in ("split", "plain"):
        shutil.rmtree(benchmark.output / "cells" / SplitCell(kind, replicate, rate).name, ignore_errors=True)


def _plain(benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """Return the figures of the student before and along plain fine-tuning."""
    from safetensors.torch import load_file

    from fewstep.pipeline.loading import load_family

    kept = {
        0: folder / "2-flash" / "students" / f"{BEFORE:06d}.safetensors",
        **{
            updates: folder / "3-split" / "students" / f"{updates:06d}.safetensors"
            for updates in (SPLIT_UPDATES, PLAIN_UPDATES)
        },
    }
    family, count = load_family(str(folder / "model")), benchmark.protocol.images
    curve: list[dict[str, Any]] = []
    for update, path in kept.items():
        family.net.load_state_dict(load_file(path))
        figures = measure_student(benchmark, family, STEPS, count=count)
        curve.append({"update": update, "images": count, "figures": figures})
    return {"curve": curve}


def _ratios(benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """Return the figures of merges, on test images and, to choose a ratio by, on training images."""
    from safetensors.torch import load_file

    from fewstep.modules.timestep_experts import merge
    from fewstep.pipeline.loading import load_family

    family = load_family(str(folder / "model"))
    early, late = (load_file(folder / "branches" / f"{name}.safetensors") for name in ("early", "late"))
    protocol, ratios = benchmark.protocol, list[dict[str, Any]]()
    measured = partial(measure_student, benchmark, family, STEPS)
    for ratio in RATIOS:
        family.net.load_state_dict(merge(early, late, ratio))
        figures = measured(count=protocol.images)
        choice = measured(count=protocol.curve_images, choice=True)
        ratios.append({"late": ratio, "figures": figures, "choice": choice})
    best = min(ratios, key=lambda point: point["choice"]["frechet"]["value"])
    curve = [{"update": SPLIT_UPDATES, "images": protocol.images, "figures": best["figures"]}]
    return {"ratios": ratios, "chosen": best["late"], "curve": curve}
