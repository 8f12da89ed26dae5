"""What all distillations share: how a student is taught, its parts, its batches, its score and its end."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.types import Batch, BatchSlice, Sampler, UserError
from fewstep.core.validate import require_at_least, require_fraction, require_positive
from fewstep.train.preview import SHOWN
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.families.base import Family
    from fewstep.methods.base import Method
    from fewstep.modules.lora import LoRARoles

LORA = "lora"
"""Beside a run's `model`: the student as a LoRA, where it is one."""


@Parameter(name="*")
@dataclass(frozen=True)
class DistillConfig:
    """How any student is taught.

    Attributes:
        teacher: The teacher, a diffusers folder or a hub name.
        output: Run folder; the student is written to its subfolder `model` as a diffusers folder.
        samples: The teacher's samples, of `fewstep sample-teacher`. [default: made in the run folder]
        data: The data set whose captions are the prompts, where samples are made.
        num_samples: How many samples are made.
        guidance: The teacher's guidance scale, where samples are made. [default: the teacher's own]
        init: Start the student from this model; with --lora, from the `lora` folder of an earlier run.
            [default: from the teacher]
        student_steps: Steps that the student shall need.
        steps: Updates in all.
        batch_size: Samples an update.
        gradient_accumulation_steps: Micro-batches an update, one after the other in memory.
        lr: Learning rate.
        t5_dropout: Share of the batches in which the student does not hear T5; 1 learns to do without.
        lora: Rank of LoRA roles: teacher, student and proxy share one frozen net; 0 trains whole nets.
        dtype: Of the frozen weights: float32 or bfloat16; what learns is float32.
        activation_checkpointing: Compute the blocks anew in the backward pass: less memory, a third more
            time.
        compile: Compile the blocks.
        max_minutes: Do as many updates as fit into so many minutes, at most --steps; 0 does --steps. Of a
            chain each stage has these minutes.
        validate_every: Updates between scores by KID to the teacher's samples; 0 scores never.
        seed: Of the data order and of all noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """

    teacher: str = "models/pocket-teacher"
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    samples: Path | None = None
    data: Path = Path("data/stickers")
    num_samples: int = 2000
    guidance: float | None = None
    init: str | None = None
    student_steps: int = 4
    steps: int = 600
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    lr: float = 1e-4
    t5_dropout: float = 1.0
    lora: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    max_minutes: float = 0.0
    validate_every: int = 0
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        require_positive(
            batch_size=self.batch_size, num_samples=self.num_samples, student_steps=self.student_steps
        )
        require_fraction(t5_dropout=self.t5_dropout)
        require_at_least(0, lora=self.lora, validate_every=self.validate_every)
        counted_threads(self.threads)
        if self.dtype != "float32" and not self.lora:
            raise UserError("--dtype bfloat16 is for frozen weights: give a rank with --lora, too")

    def build_context(
        self, name: str, *, walks: bool = False, split: bool = False, folder: Path | None = None
    ) -> DistillContext:
        """The parts of a method's distillation (:func:`fewstep.distill.setup.build_context`)."""
        from fewstep.distill.setup import build_context

        return build_context(self, name, walks=walks, split=split, folder=folder)


@dataclass(frozen=True)
class Trainable:
    """A net that learns, and how it is called.

    Attributes:
        net: what an optimizer trains: a whole net, or a role's LoRA.
        velocity: the net, or the shared net in that role.
        blocks: of the net that runs.
        body: the net that runs and its blocks, for who shards, compiles and recomputes.
    """

    net: Any
    velocity: Any
    blocks: Sequence[Any]
    body: Any


@dataclass(frozen=True)
class DistillContext:
    """One distillation's parts, loaded.

    Attributes:
        config: what was asked for.
        name: of the method.
        folder: of the run.
        teacher: nothing in it learns.
        samples: its samples.
        initial: the model that the student starts from; the teacher itself where no other is named.
        net_class: class of the teacher's net; sharding gives it another.
        roles: of the teacher's net, where one net is all of them.
        sampler: how the student takes its steps.
    """

    config: DistillConfig
    name: str
    folder: Path
    teacher: Family
    samples: TeacherSamples
    initial: Family
    net_class: Any
    roles: LoRARoles | None = None
    sampler: Sampler = "euler"

    @property
    def grid(self) -> list[float]:
        """The student's times."""
        from fewstep.core import schedule

        return schedule.grid(self.config.student_steps, self.teacher.shift)

    @cached_property
    def guided_teacher(self) -> Any:
        """The teacher at the guidance of its samples, as a velocity."""
        from fewstep.core.guidance import Guided

        scale = self.samples.plan.guidance
        if self.teacher.guidance is None:
            return self.plain_teacher
        null = self.samples.null.map(lambda array: array.to(self.teacher.net.device))
        return Guided(self.plain_teacher, null, 1.0 if scale is None else scale)

    @property
    def plain_teacher(self) -> Any:
        """The teacher in one pass: told its guidance, where it is told any."""
        scale = self.samples.plan.guidance
        told = self.teacher.guidance is None and scale is not None
        velocity = (
            self.teacher.with_guidance(scale) if told and scale is not None else self.teacher
        ).velocity
        return self.roles.velocity(None, velocity) if self.roles is not None else velocity

    @cached_property
    def start_fingerprint(self) -> str:
        """What tells where the student starts from: weights, or the LoRA by its place."""
        from fewstep.families.common import fingerprint

        if self.roles is not None:
            return f"rank {self.config.lora} {self.config.init}"
        return "the teacher" if self.initial is self.teacher else fingerprint(self.initial.net)

    @cached_property
    def student(self) -> Trainable:
        """The net of the method that is the student."""
        return self.trainable("student", self.initial)

    def trainable(self, name: str, start: Family | None = None) -> Trainable:
        """A net that starts from a model's weights, by default the teacher's: its own copy, or a role."""
        if self.roles is not None:
            velocity = self.roles.velocity(name, self.teacher.velocity)
            return Trainable(self.roles.net(name), velocity, self.teacher.blocks, self.teacher)
        start = start or self.teacher
        own = start.student(copy.deepcopy(start.net), name, self.config.student_steps)
        return Trainable(own.net, own.velocity, own.blocks, own)

    def weights(self, name: str, nets: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of a learnt net, as a whole and plain one."""
        return self.roles.merged(name) if self.roles is not None else nets[name].state_dict()

    def batches(self, step: int, share: BatchSlice) -> Batch:
        """The teacher's samples of a step; walks at the student's times, where they were kept."""
        setting = self.config
        rows = self.samples.rows(step, setting.batch_size, setting.seed)[share.slice_of(setting.batch_size)]
        batch = self.samples.read(rows)
        states = batch.trajectory
        if states is not None and (stride := self.samples.plan.student_steps // setting.student_steps) > 1:
            states = states[:, ::stride]
        rng = np.random.Generator(np.random.Philox(key=[setting.seed, step]))
        without = self.samples.without_t5(batch.cond) if rng.random() < setting.t5_dropout else None
        return replace(batch, trajectory=states, cond_without_t5=without)

    def run(self, method: Method, *learners: Trainable, **options: Any) -> Run:
        """The run of a method, of its net ``student``, where it has one, and of the others that learn.

        What no step needs, text encoders and codec, leaves the device.
        """
        from fewstep.distill.validation import KidToTeacher
        from fewstep.families import common

        setting = self.config
        usual: dict[str, Any] = {"warmup": 20, "decay": 0.5, "ema": 0.99, "preview_every": 200}
        told: dict[str, Any] = {
            "seed": setting.seed,
            "device": setting.device,
            "threads": setting.threads,
            "tokens": self._tokens(),
            "gradient_accumulation_steps": setting.gradient_accumulation_steps,
            "activation_checkpointing": setting.activation_checkpointing,
            "compile": setting.compile,
            "max_minutes": setting.max_minutes,
            "validate_every": setting.validate_every,
        }
        resolved = TrainOptions(setting.steps, setting.lr, **usual | told | options)
        about = {
            "recipe": f"distill-{self.name}",
            **{name: str(value) for name, value in vars(setting).items()},
            "guidance": self.samples.plan.guidance,
            "made_of": {
                "teacher": self.samples.plan.weights,
                "number of steps": str(setting.student_steps),
                "share of T5": str(setting.t5_dropout),
                "start": self.start_fingerprint,
            },
        }
        score = KidToTeacher(self) if setting.validate_every else None
        own = [self.student] if "student" in method.nets else []
        common.offload_encoders(self.teacher)
        return Run(
            self.name,
            self.folder,
            method,
            self.batches,
            resolved,
            about,
            averaged=["student"],
            preview=self.preview,
            finish=self.finish,
            bodies=[*(learner.body for learner in (*own, *learners)), self.teacher],
            score=(lambda nets: score(self.student.velocity)) if score else None,
            metric=KidToTeacher.metric,
        )

    def sample_student(self, velocity: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """What a student draws, latents ``[B, C, H, W]``, one seed a prompt."""
        import torch

        from fewstep.core import sampling
        from fewstep.families import common

        family = self.teacher
        with torch.no_grad():
            with common.on_device(family), common.cuts_known():
                cond = family.text(prompts)
            if self.config.t5_dropout > 0:
                cond = self.samples.without_t5(cond)
            return sampling.generate_latents(
                family, cond, seeds, self.grid, velocity=velocity, sampler=self.sampler
            )

    def preview(self, nets: Mapping[str, Any]) -> Any:
        """Pictures of fixed prompts and seeds."""
        from fewstep.families import common
        from fewstep.train.preview import decode_grid

        drawn = self.sample_student(self.student.velocity, SHOWN, range(len(SHOWN)))
        with common.on_device(self.teacher, "vae"):
            return decode_grid(self.teacher, drawn, SHOWN)

    def finish(self, nets: Mapping[str, Any]) -> None:
        """Write the student as a diffusers folder; a role as a LoRA beside it, in ``lora``, which says how it
        draws."""
        from fewstep.core.atomic import replacing_folder
        from fewstep.families.diffusers_io import write_facts
        from fewstep.families.lora.role_files import save_role

        if self.roles is not None:
            facts = {
                "name": f"{self.teacher.name}-{self.name}",
                "steps": self.config.student_steps,
                "guidance": self.teacher.embedded_guidance,
                "sampler": self.sampler,
                "t5": self.config.t5_dropout < 1,
            }
            with replacing_folder(self.folder / LORA) as fresh:
                save_role(self.roles, "student", fresh)
                write_facts(facts, fresh)
        self.write(self.weights("student", nets))

    def new_net(self) -> Any:
        """A net of the teacher's kind, on the CPU, to be given weights."""
        # Not a copy: a net that was sharded holds processes, which cannot be copied.
        return self.net_class.from_config(self.teacher.net.config).to(self.teacher.net.dtype).eval()

    def write(self, weights: Mapping[str, Any]) -> None:
        """Write a student of these weights as a diffusers folder, under its teacher's licence."""
        from fewstep.core.atomic import replacing_folder
        from fewstep.families import common

        net = self.new_net()
        net.load_state_dict(weights)
        family = self.teacher.student(net, f"{self.teacher.name}-{self.name}", self.config.student_steps)
        if self.config.t5_dropout == 1:
            family = family.without_t5()
        if self.sampler == "renoise":
            family = common.with_renoise_sampler(family)
        licence = Path(self.config.teacher) / "LICENSE"
        with replacing_folder(self.folder / "model") as fresh:
            family.save(fresh)
            if licence.is_file():
                shutil.copyfile(licence, fresh / "LICENSE")

    def _tokens(self) -> int:
        _, height, width = self.teacher.latent
        return height * width // 4 + self.samples.plan.context[0]
