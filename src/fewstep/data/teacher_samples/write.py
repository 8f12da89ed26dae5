"""Write samples of a guided teacher, shard by shard.

A shard is complete or absent, so an interrupted run continues with the next shard.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.core import guidance, sampling, schedule
from fewstep.core.atomic import held, replacing_file
from fewstep.core.types import Array, Cond, Model, UserError, Velocity
from fewstep.data import shards
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.manifest import NULL, Plan
from fewstep.images.pixels import finite, to_pil, to_uint8

Numpy = np.ndarray
Progress = Callable[[int, int], None]
"""Called with the number of samples of this rank that are done, and of all."""


def write_samples(
    teacher: Model,
    prompts: Sequence[str],
    plan: Plan,
    folder: Path,
    *,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write this rank's shards of ``plan`` into ``folder``; existing ones are kept.

    Args:
        teacher: sampled with guidance; without a second pass if its ``guidance`` is ``None``.
        prompts: the captions, ``plan.number`` of them.
        plan: from :func:`fewstep.data.teacher_samples.manifest.make`, the same on every rank.
        folder: of the shards.
        batch: samples per batch.
        rank: shard ``k`` is written by rank ``k % world``; ranks do not communicate.
        world: number of ranks.
        progress: called after every batch.

    Raises:
        UserError: the folder has another plan, the captions are not the plan's, or values of a sample exceed
            half precision.
    """
    if len(prompts) != plan.number or manifest.digest(prompts) != plan.captions:
        raise UserError("these captions are not the plan's")
    action = "filled" if world == 1 else f"filled as rank {rank}"
    with held(folder, action, f".rank-{rank}.lock"):
        _write(teacher, prompts, plan, folder, batch, range(rank, plan.shards, world), progress)


def _write(
    teacher: Model,
    prompts: Sequence[str],
    plan: Plan,
    folder: Path,
    batch: int,
    mine: range,
    progress: Progress,
) -> None:
    """Write the shards ``mine`` of ``plan`` that do not exist."""
    plan = manifest.claim(folder, plan)
    null = teacher.text([""])
    if not (folder / NULL).exists():
        with replacing_file(folder / NULL) as fresh:
            np.savez(
                fresh,
                context=_half(teacher.to_numpy(null.context)),
                pooled=_half(teacher.to_numpy(null.pooled)),
            )
    writer = _SampleFiles(teacher, prompts, plan, null, batch)
    total = sum(len(plan.rows(shard)) for shard in mine)
    todo = [shard for shard in mine if not plan.path(folder, shard).exists()]
    done = total - sum(len(plan.rows(shard)) for shard in todo)
    progress(done, total)
    for shard in todo:
        path = plan.path(folder, shard)
        with replacing_file(path) as fresh, tarfile.open(fresh, "w") as tar:
            for samples in writer.batches(plan.rows(shard)):
                for files in samples:
                    for name, data in files.items():
                        shards.add_file(tar, name, data)
                done += len(samples)
                progress(done, total)


@dataclass(frozen=True)
class _SampleFiles:
    """Samples the teacher and returns the files of each sample."""

    teacher: Model
    prompts: Sequence[str]
    plan: Plan
    null: Cond
    batch: int

    @property
    def velocity(self) -> Velocity:
        if self.teacher.guidance is None or self.plan.guidance is None:
            return self.teacher.velocity
        return guidance.Guided(self.teacher.velocity, self.null, self.plan.guidance)

    def batches(self, rows: range) -> Iterator[list[dict[str, bytes]]]:
        """Yield the files of ``rows``, batch by batch; no batch crosses shards."""
        for start in range(rows.start, rows.stop, self.batch):
            yield self._make(range(start, min(start + self.batch, rows.stop)))

    def _make(self, rows: range) -> list[dict[str, bytes]]:
        cond = self.teacher.text([self.prompts[row] for row in rows])
        states, last = self._sample(rows, cond)
        context, pooled = (_half(self.teacher.to_numpy(array)) for array in (cond.context, cond.pooled))
        samples: list[dict[str, bytes]] = []
        for index, row in enumerate(rows):
            key = f"{row:08d}"
            files = {
                f"{key}.txt": self.prompts[row].encode(),
                f"{key}.json": json.dumps(self._record(row)).encode(),
                f"{key}.states.npy": _npy(states[index]),
                f"{key}.context.npy": _npy(context[index]),
                f"{key}.pooled.npy": _npy(pooled[index]),
            }
            if self.plan.pictures:
                files[f"{key}.png"] = self._image(last[index : index + 1])
            samples.append(files)
        return samples

    def _sample(self, rows: range, cond: Cond) -> tuple[Numpy, Array]:
        """Return the states to keep, float16 ``[B, S + 1, C, H, W]``, and the teacher's latents."""
        plan = self.plan
        stride = plan.steps // (plan.student_steps or 1)
        kept: list[Numpy] = []

        def keep(index: int, x: Array) -> None:
            if index % stride == 0 and (index or plan.student_steps):
                kept.append(self.teacher.to_numpy(x))

        latents = sampling.generate_latents(
            self.teacher,
            cond,
            [plan.seed + row for row in rows],
            schedule.grid(plan.steps, plan.shift),
            velocity=self.velocity,
            sampler="euler",
            hooks=sampling.Hooks(on_state=keep),
        )
        states = np.stack(kept, axis=1)
        sizes = np.abs(states).reshape(len(states), -1).max(axis=1)
        for row, size in zip(rows, sizes, strict=True):
            if not size <= np.finfo(np.float16).max:  # NaN is not
                raise UserError(
                    f"the teacher's trajectory from seed {plan.seed + row} grows to {size}; "
                    "take another --dtype, or less guidance"
                )
        return _half(states), latents

    def _record(self, row: int) -> Mapping[str, object]:
        plan = self.plan
        record = {"seed": plan.seed + row, "guidance": plan.guidance, "steps": plan.steps}
        return record | {"teacher": plan.teacher, "weights": plan.weights, "times": plan.times}

    def _image(self, latents: Array) -> bytes:
        file = io.BytesIO()
        to_pil(to_uint8(self.teacher.codec.decode(latents)))[0].save(file, "PNG")
        return file.getvalue()


def _half(array: Numpy) -> Numpy:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not finite(half):
        raise UserError("the teacher's text encoders give NaN, or values too large for half precision")
    return half


def _npy(array: Numpy) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
