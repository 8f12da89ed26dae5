"""Batches of a distillation: the teacher's samples of a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core.types import Batch, BatchSlice
from fewstep.distill.config import DistillConfig

if TYPE_CHECKING:
    from fewstep.data.teacher_samples.read import TeacherSamples


@dataclass(frozen=True)
class SampleBatches:
    """The teacher's samples as batches, a function of the training step alone.

    Attributes:
        samples: the samples.
        config: batch size, seed, the student's steps and the T5 dropout.
    """

    samples: TeacherSamples
    config: DistillConfig

    def __call__(self, step: int, share: BatchSlice) -> Batch:
        """Return this process's part of the batch of ``step``.

        Trajectories, where they were kept, are cut to the times of the student's grid.
        """
        config = self.config
        rows = self.samples.rows(step, config.batch_size, config.seed)[share.slice_of(config.batch_size)]
        batch = self.samples.read(rows)
        states = batch.trajectory
        if states is not None and (stride := self.samples.plan.student_steps // config.student_steps) > 1:
            states = states[:, ::stride]
        rng = np.random.Generator(np.random.Philox(key=[config.seed, step]))
        without_t5 = self.samples.without_t5(batch.cond) if rng.random() < config.t5_dropout else None
        return replace(batch, trajectory=states, cond_without_t5=without_t5)
