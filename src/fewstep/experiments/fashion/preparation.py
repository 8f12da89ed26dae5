"""What all cells share: data, judge, teacher, its samples, warm starts, and the views of real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core import atomic, json_io, signals
from fewstep.data.teacher_samples import manifest
from fewstep.experiments.fashion.protocol import TEST_SEED, VALIDATION_SEED, Protocol
from fewstep.experiments.subprocesses import ProcessGroup, run_training
from fewstep.fashion import data as fashion
from fewstep.fashion import judge
from fewstep.fashion.measures import Viewer, Views
from fewstep.fashion.sampling import Samples, sample

if TYPE_CHECKING:
    from fewstep.families.base import Family


@dataclass(frozen=True)
class Benchmark:
    """The folders of the benchmark and what is read from them.

    Attributes:
        output: folder of all runs.
        data: the data set.
        judge_folder: run folder of the judge.
        teacher: the teacher, as ``fewstep distill --teacher`` takes it.
        protocol: sizes of the experiment.
        device: auto, cpu or cuda.
        threads: torch threads of each process; 0 leaves torch's choice.
        check: called between batches of images; it may raise to stop.
    """

    output: Path
    data: Path
    judge_folder: Path
    teacher: str
    protocol: Protocol
    device: str = "auto"
    threads: int = 0
    check: Callable[[], None] = signals.check

    @property
    def machine(self) -> list[str]:
        """Options of a training that its result does not depend on, up to rounding."""
        return ["--device", self.device, "--threads", str(self.threads)]

    def samples(self, replicate: int) -> Path:
        """Return the folder of a replicate's teacher samples."""
        return self.output / f"samples.{replicate}"

    def warm_start(self, steps: int, replicate: int) -> Path:
        """Return the run folder of a replicate's warm start for students of ``steps`` steps."""
        return self.output / f"warm.{steps}.{replicate}"

    def make_samples(self, processes: ProcessGroup, replicate: int) -> None:
        """Sample the teacher for a replicate; a finished folder is left as it is.

        Raises:
            UserError: the folder is of another plan, or the sampling failed.
        """
        protocol, folder = self.protocol, self.samples(replicate)
        if self._is_sampled(folder):
            return
        prompts = self.output / "classes.txt"
        if not prompts.exists():
            prompts.parent.mkdir(parents=True, exist_ok=True)
            prompts.write_text("".join(f"{name}\n" for name in fashion.CLASSES))
        arguments = ["sample-teacher", "--teacher", self.teacher, "--output", str(folder)]
        arguments += ["--prompts", str(prompts), "--num-samples", str(protocol.samples)]
        arguments += ["--steps", str(protocol.teacher_steps), "--guidance", str(protocol.guidance)]
        arguments += ["--student-steps", "4", "--batch-size", "250", "--per-shard", "1000"]
        arguments += ["--seed", str(1_000_000 * (replicate + 1)), *self.machine]
        processes.run(folder.name, arguments, threads=self.threads)

    def _is_sampled(self, folder: Path) -> bool:
        """Return whether a folder has all the samples of the protocol."""
        if not (folder / manifest.PLAN).is_file():
            return False
        plan, protocol = manifest.read(folder), self.protocol
        asked = (protocol.samples, protocol.teacher_steps, protocol.guidance)
        whole = all(plan.path(folder, shard).is_file() for shard in range(plan.shards))
        return whole and (plan.number, plan.steps, plan.guidance) == asked

    def make_warm_start(self, processes: ProcessGroup, steps: int, replicate: int) -> None:
        """Train a replicate's warm start; a finished one is left as it is."""
        protocol = self.protocol
        arguments = ["trajectory", "--teacher", self.teacher, "--samples", str(self.samples(replicate))]
        arguments += ["--student-steps", str(steps), "--steps", str(protocol.warm_updates)]
        arguments += ["--batch-size", str(protocol.warm_batch), "--lr", f"{protocol.warm_rate:g}"]
        arguments += ["--seed", str(100 + replicate), "--decay", "0.5", "--precision", "fp32"]
        run_training(processes, self.warm_start(steps, replicate), arguments, self.machine, self.threads)

    @cached_property
    def training(self) -> fashion.LabelledImages:
        """The training images."""
        return fashion.load(self.data, "train")

    @cached_property
    def viewer(self) -> Viewer:
        """Makes views of images."""
        return Viewer.fit(judge.load(self.judge_folder), self.training)

    @cached_property
    def real(self) -> Views:
        """Views of the test images, which tables compare with."""
        return self.viewer(fashion.load(self.data, "test").images[: self.protocol.images])

    @cached_property
    def real_validation(self) -> Views:
        """Views of training images, which choices compare with."""
        return self.viewer(self.training.images[: self.protocol.images])

    @cached_property
    def family(self) -> Family:
        """The teacher."""
        from fewstep.pipeline.loading import load_family
        from fewstep.train.device import resolve_device

        return load_family(self.teacher, device=resolve_device(self.device))

    def sample_teacher(self, count: int, seed: int = TEST_SEED, steps: int | None = None) -> Samples:
        """Sample the teacher with guidance, the classes in turn."""
        protocol = self.protocol
        steps = steps or protocol.teacher_steps
        return sample(
            self.family,
            count=count,
            steps=steps,
            guidance=protocol.guidance,
            seed=seed,
            check=self.check,
        )

    @cached_property
    def teacher_views(self) -> Views:
        """Views of the teacher's images, from other noise than that of students; cached in a file."""
        from fewstep.families.common import fingerprint

        count = self.protocol.images
        path = self.output / f"teacher-images-{fingerprint(self.family.net)}-{count}.npz"
        if not path.exists():
            samples = self.sample_teacher(count, VALIDATION_SEED + 5_000_000)
            with atomic.replacing_file(path) as fresh:
                np.savez_compressed(fresh, images=samples.images)
        with np.load(path) as arrays:
            return self.viewer(arrays["images"])

    def prepare_views(self) -> None:
        """Make all views that cells compare with, once, before cells run side by side."""
        _ = self.real, self.real_validation, self.teacher_views

    @cached_property
    def judge_accuracy(self) -> float:
        """The judge's accuracy on the test images."""
        facts = json_io.read(self.judge_folder / "model" / "judge.json", dict[str, object])
        return float(str(facts["test_accuracy"]))
