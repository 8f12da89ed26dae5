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

from fewstep.recipes.parts import SHOWN, at_least, at_least_one, shares
from fewstep.request import threads as counted_threads
from fewstep.train import Options, Run
from fewstep.types import Batch, Sampler, Share, UserError

if TYPE_CHECKING:
    from fewstep.data.synthesis.read import Synthetic
    from fewstep.families import Family
    from fewstep.methods import Method
    from fewstep.nets.roles import Roles

LORA = "lora"
"""Beside a run's `model`: the student as a LoRA, where it is one."""


@Parameter(name="*")
@dataclass(frozen=True)
class Setting:
    """How any student is taught.

    Attributes:
        teacher: The teacher, a diffusers folder or a hub name.
        out: Run folder; the student is written to its subfolder `model` as a diffusers folder.
        synthetic: The teacher's samples, of `fewstep synthesize`. [default: made in the run folder]
        data: The data set whose captions are the prompts, where samples are made.
        walks: How many samples are made.
        guidance: The teacher's guidance scale, where samples are made. [default: the teacher's own]
        init: Start the student from this model; with --lora, from the `lora` folder of an earlier run.
            [default: from the teacher]
        student_steps: Steps that the student shall need.
        steps: Updates in all.
        batch: Samples an update.
        accumulate: Micro-batches an update, one after the other in memory.
        lr: Learning rate.
        drop_t5: Share of the batches in which the student does not hear T5; 1 learns to do without.
        lora: Rank of LoRA roles: teacher, student and proxy share one frozen net; 0 trains whole nets.
        dtype: Of the frozen weights: float32 or bfloat16; what learns is float32.
        recompute: Compute the blocks anew in the backward pass: less memory, a third more time.
        compile: Compile the blocks.
        minutes: Do as many updates as fit into so many minutes, at most --steps; 0 does --steps. Of a chain
            each stage has these minutes.
        score_every: Updates between scores by KID to the teacher's samples; 0 scores never.
        seed: Of the data order and of all noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """

    teacher: str = "models/pocket-teacher"
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None
    synthetic: Path | None = None
    data: Path = Path("data/stickers")
    walks: int = 2000
    guidance: float | None = None
    init: str | None = None
    student_steps: int = 4
    steps: int = 600
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    drop_t5: float = 1.0
    lora: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    compile: bool = False
    minutes: float = 0.0
    score_every: int = 0
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        at_least_one(batch=self.batch, walks=self.walks, student_steps=self.student_steps)
        shares(drop_t5=self.drop_t5)
        at_least(0, lora=self.lora, score_every=self.score_every)
        counted_threads(self.threads)
        if self.dtype != "float32" and not self.lora:
            raise UserError("--dtype bfloat16 is for frozen weights: give a rank with --lora, too")

    def lesson(
        self, name: str, *, walks: bool = False, split: bool = False, folder: Path | None = None
    ) -> Lesson:
        """The parts of a method's distillation (:func:`fewstep.recipes.load.lesson`)."""
        from fewstep.recipes.load import lesson

        return lesson(self, name, walks=walks, split=split, folder=folder)


@dataclass(frozen=True)
class Learner:
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
class Lesson:
    """One distillation's parts, loaded.

    Attributes:
        setting: what was asked for.
        name: of the method.
        folder: of the run.
        teacher: nothing in it learns.
        made: its samples.
        begin: the model that the student starts from; the teacher itself where no other is named.
        kind: class of the teacher's net; sharding gives it another.
        roles: of the teacher's net, where one net is all of them.
        sampler: how the student takes its steps.
    """

    setting: Setting
    name: str
    folder: Path
    teacher: Family
    made: Synthetic
    begin: Family
    kind: Any
    roles: Roles | None = None
    sampler: Sampler = "euler"

    @property
    def grid(self) -> list[float]:
        """The student's times."""
        from fewstep import times

        return times.grid(self.setting.student_steps, self.teacher.shift)

    @cached_property
    def guided(self) -> Any:
        """The teacher at the guidance of its samples, as a velocity."""
        from fewstep.guide import Guided

        scale = self.made.plan.guidance
        if self.teacher.guidance is None:
            return self.plain_teacher
        null = self.made.null.map(lambda array: array.to(self.teacher.net.device))
        return Guided(self.plain_teacher, null, 1.0 if scale is None else scale)

    @property
    def plain_teacher(self) -> Any:
        """The teacher in one pass: told its guidance, where it is told any."""
        scale = self.made.plan.guidance
        told = self.teacher.guidance is None and scale is not None
        velocity = (self.teacher.at(scale) if told and scale is not None else self.teacher).velocity
        return self.roles.velocity(None, velocity) if self.roles is not None else velocity

    @cached_property
    def start(self) -> str:
        """What tells where the student starts from: weights, or the LoRA by its place."""
        from fewstep.recipes.parts import fingerprint

        if self.roles is not None:
            return f"rank {self.setting.lora} {self.setting.init}"
        return "the teacher" if self.begin is self.teacher else fingerprint(self.begin.net)

    @cached_property
    def student(self) -> Learner:
        """The net of the method that is the student."""
        return self.learner("student", self.begin)

    def learner(self, name: str, start: Family | None = None) -> Learner:
        """A net that starts from a model's weights, by default the teacher's: its own copy, or a role."""
        if self.roles is not None:
            velocity = self.roles.velocity(name, self.teacher.velocity)
            return Learner(self.roles.net(name), velocity, self.teacher.blocks, self.teacher)
        start = start or self.teacher
        own = start.student(copy.deepcopy(start.net), name, self.setting.student_steps)
        return Learner(own.net, own.velocity, own.blocks, own)

    def weights(self, name: str, nets: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of a learnt net, as a whole and plain one."""
        return self.roles.merged(name) if self.roles is not None else nets[name].state_dict()

    def batches(self, step: int, share: Share) -> Batch:
        """The teacher's samples of a step; walks at the student's times, where they were kept."""
        setting = self.setting
        rows = self.made.rows(step, setting.batch, setting.seed)[share.cut(setting.batch)]
        batch = self.made.read(rows)
        states = batch.states
        if states is not None and (stride := self.made.plan.student_steps // setting.student_steps) > 1:
            states = states[:, ::stride]
        rng = np.random.Generator(np.random.Philox(key=[setting.seed, step]))
        without = self.made.without_t5(batch.cond) if rng.random() < setting.drop_t5 else None
        return replace(batch, states=states, short=without)

    def run(self, method: Method, *learners: Learner, **options: Any) -> Run:
        """The run of a method, of its net ``student``, where it has one, and of the others that learn.

        What no step needs, text encoders and codec, leaves the device.
        """
        from fewstep.families import common
        from fewstep.recipes.score import KidToTeacher

        setting = self.setting
        usual: dict[str, Any] = {"warmup": 20, "decay": 0.5, "ema": 0.99, "sheet_every": 200}
        told: dict[str, Any] = {
            "seed": setting.seed,
            "device": setting.device,
            "threads": setting.threads,
            "tokens": self._tokens(),
            "accumulate": setting.accumulate,
            "recompute": setting.recompute,
            "compile": setting.compile,
            "minutes": setting.minutes,
            "score_every": setting.score_every,
        }
        resolved = Options(setting.steps, setting.lr, **usual | told | options)
        about = {
            "recipe": f"distill-{self.name}",
            **{name: str(value) for name, value in vars(setting).items()},
            "guidance": self.made.plan.guidance,
            "made_of": {
                "teacher": self.made.plan.weights,
                "number of steps": str(setting.student_steps),
                "share of T5": str(setting.drop_t5),
                "start": self.start,
            },
        }
        score = KidToTeacher(self) if setting.score_every else None
        own = [self.student] if "student" in method.nets else []
        common.aside(self.teacher)
        return Run(
            self.name,
            self.folder,
            method,
            self.batches,
            resolved,
            about,
            averaged=["student"],
            sheet=self.sheet,
            finish=self.finish,
            bodies=[*(learner.body for learner in (*own, *learners)), self.teacher],
            score=(lambda nets: score(self.student.velocity)) if score else None,
            metric=KidToTeacher.metric,
        )

    def draw(self, velocity: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """What a student draws, latents ``[B, C, H, W]``, one seed a prompt."""
        import torch

        from fewstep import sample
        from fewstep.families import common

        family = self.teacher
        with torch.no_grad():
            with common.at_hand(family), common.cuts_known():
                cond = family.text(prompts)
            if self.setting.drop_t5 > 0:
                cond = self.made.without_t5(cond)
            noise = family.lift(sample.noises(seeds, family.latent))
            step = sample.taken(self.sampler, seeds, family.lift)
            return sample.walk(velocity, noise, self.grid, cond, step)

    def sheet(self, nets: Mapping[str, Any]) -> Any:
        """Pictures of fixed prompts and seeds."""
        from fewstep.families import common
        from fewstep.recipes.parts import decoded

        drawn = self.draw(self.student.velocity, SHOWN, range(len(SHOWN)))
        with common.at_hand(self.teacher, "vae"):
            return decoded(self.teacher, drawn, SHOWN)

    def finish(self, nets: Mapping[str, Any]) -> None:
        """Write the student as a diffusers folder; a role as a LoRA beside it, in ``lora``, which says how it
        draws."""
        from fewstep.families.folder import write_facts
        from fewstep.files import replacing_folder

        if self.roles is not None:
            facts = {
                "name": f"{self.teacher.name}-{self.name}",
                "steps": self.setting.student_steps,
                "guidance": self.teacher.embedded_guidance,
                "sampler": self.sampler,
                "t5": self.setting.drop_t5 < 1,
            }
            with replacing_folder(self.folder / LORA) as fresh:
                self.roles.save("student", fresh)
                write_facts(facts, fresh)
        self.write(self.weights("student", nets))

    def plain(self) -> Any:
        """A net of the teacher's kind, on the CPU, to be given weights."""
        # Not a copy: a net that was sharded holds processes, which cannot be copied.
        return self.kind.from_config(self.teacher.net.config).to(self.teacher.net.dtype).eval()

    def write(self, weights: Mapping[str, Any]) -> None:
        """Write a student of these weights as a diffusers folder, under its teacher's licence."""
        from fewstep.families import common
        from fewstep.files import replacing_folder

        net = self.plain()
        net.load_state_dict(weights)
        family = self.teacher.student(net, f"{self.teacher.name}-{self.name}", self.setting.student_steps)
        if self.setting.drop_t5 == 1:
            family = family.without_t5()
        if self.sampler == "renoise":
            family = common.renoising(family)
        licence = Path(self.setting.teacher) / "LICENSE"
        with replacing_folder(self.folder / "model") as fresh:
            family.module.save(family, fresh)
            if licence.is_file():
                shutil.copyfile(licence, fresh / "LICENSE")

    def _tokens(self) -> int:
        _, height, width = self.teacher.latent
        return height * width // 4 + self.made.plan.context[0]
