"""The loaded parts of a distillation: teacher, samples, and the nets that are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Sampler, Velocity
from fewstep.distill.config import DistillConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from fewstep.data.teacher_samples.read import TeacherSamples
    from fewstep.families.base import Family
    from fewstep.modules.lora import LoRARoles
    from fewstep.train.run import ParallelModule


@dataclass(frozen=True)
class Trainable:
    """A net that is trained.

    Attributes:
        net: what the optimizer updates: a full net, or a LoRA adapter of the shared net.
        velocity: the net as a velocity, or the shared net with that adapter.
        blocks: the transformer blocks of the net that runs.
        body: the net that runs and its blocks, to be sharded, compiled and checkpointed.
    """

    net: Module
    velocity: Velocity
    blocks: Sequence[Module]
    body: ParallelModule


@dataclass(frozen=True)
class DistillContext:
    """The loaded parts of one distillation, built by :func:`fewstep.distill.setup.build_context`.

    Attributes:
        config: the options.
        name: of the method.
        folder: of the run.
        teacher: the frozen teacher.
        samples: its samples.
        initial: the model that the student starts from: the teacher itself unless ``--init`` names another.
        net_class: diffusers class of the teacher's net. Sharding changes the class of the net itself.
        adapters: LoRA adapters of the teacher's net; ``None`` in full fine-tuning.
        sampler: how the student takes its steps.
    """

    config: DistillConfig
    name: str
    folder: Path
    teacher: Family
    samples: TeacherSamples
    initial: Family
    net_class: type[Any]
    adapters: LoRARoles | None = None
    sampler: Sampler = "euler"

    @property
    def grid(self) -> list[float]:
        """The student's times, descending from 1 to 0."""
        from fewstep.core import schedule

        return schedule.grid(self.config.student_steps, self.teacher.shift)

    @property
    def guidance(self) -> float | None:
        """The teacher's guidance scale in the losses."""
        own = self.config.teacher_guidance
        return self.samples.plan.guidance if own is None else own

    @cached_property
    def guided_teacher(self) -> Velocity:
        """The teacher as a velocity, with guidance."""
        from fewstep.core.guidance import Guided

        scale = self.guidance
        if self.teacher.guidance is None:
            return self.plain_teacher
        null = self.samples.null.map(lambda array: array.to(self.teacher.net.device))
        return Guided(self.plain_teacher, null, 1.0 if scale is None else scale)

    @property
    def plain_teacher(self) -> Velocity:
        """The teacher in one pass; a net with embedded guidance is given the guidance scale."""
        scale, teacher = self.guidance, self.teacher
        if teacher.guidance is None and scale is not None:
            teacher = teacher.with_guidance(scale)
        velocity = teacher.velocity
        return self.adapters.velocity(None, velocity) if self.adapters is not None else velocity

    @cached_property
    def start_fingerprint(self) -> str:
        """Identifies the weights that the student starts from; LoRA adapters are identified by their path."""
        from fewstep.families.common import fingerprint

        if self.adapters is not None:
            return f"rank {self.config.lora} {self.config.init}"
        return "the teacher" if self.initial is self.teacher else fingerprint(self.initial.net)

    @cached_property
    def student(self) -> Trainable:
        """The student."""
        return self.trainable("student", self.initial)

    def trainable(self, name: str, start: Family | None = None) -> Trainable:
        """Return a net to train: a copy of a model's net, or a LoRA adapter of the teacher's net.

        Args:
            name: of the net; one of the adapters' names with ``--lora``.
            start: the model whose net is copied, by default the teacher.
        """
        if self.adapters is not None:
            velocity = self.adapters.velocity(name, self.teacher.velocity)
            return Trainable(self.adapters.net(name), velocity, self.teacher.blocks, self.teacher)
        start = start or self.teacher
        own = start.student(copy.deepcopy(start.net), name, self.config.student_steps)
        return Trainable(own.net, own.velocity, own.blocks, own)

    def weights(self, name: str, nets: Mapping[str, Module]) -> dict[str, Tensor]:
        """Return the state dict of a trained net; that of an adapter is merged into the shared net's."""
        return self.adapters.merged(name) if self.adapters is not None else nets[name].state_dict()

    def new_net(self) -> Any:
        """Return a net of the teacher's class and configuration, on the CPU, to load weights into."""
        # Not a copy: a net that was sharded holds process groups, which cannot be copied.
        return self.net_class.from_config(self.teacher.net.config).to(self.teacher.net.dtype).eval()
