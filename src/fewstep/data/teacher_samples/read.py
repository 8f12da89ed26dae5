"""Read samples of a teacher by row. Only captions and offsets are held in memory."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fewstep.core.prompt_text import decode_caption
from fewstep.core.types import Batch, Cond, UserError
from fewstep.data import sampler
from fewstep.data.npy import MAX_HEADER, from_npy, from_npz
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.manifest import NULL, Plan

KINDS = ("states", "context", "pooled")
MAX_CAPTION_BYTES = 2**20

Numpy = np.ndarray


@dataclass(frozen=True)
class TeacherSamples:
    """A finished folder of teacher samples, opened by :meth:`open`.

    Attributes:
        folder: the folder.
        plan: its plan.
        prompts: captions, ``N``.
        null: condition of the empty prompt, one row, torch float32: the unconditional side of guidance.
        offsets: where each row's arrays begin in its shard, in bytes, int64 ``[N, 3]`` (:data:`KINDS`).
    """

    folder: Path
    plan: Plan
    prompts: list[str]
    null: Cond
    offsets: Numpy

    @classmethod
    def open(cls, folder: str | Path) -> TeacherSamples:
        """Index a folder of ``fewstep sample-teacher``; no array is read.

        Raises:
            UserError: it is no such folder or not finished, or a shard is cut short, empty, of another plan
                or without a caption.
        """
        folder = Path(folder)
        plan = manifest.read(folder)
        # The files are counted, because a plan may claim a thousand million shards.
        names = {path.name for path in folder.glob("synthetic-*.tar") if path.is_file()}
        there = min(len(names), plan.shards)
        if there < plan.shards or any(plan.path(folder, k).name not in names for k in range(there)):
            raise UserError(
                f"{folder}: {there} of {plan.shards} shards are there; "
                "run the same fewstep sample-teacher again"
            )
        prompts: list[str] = []
        offsets: list[list[int]] = []
        for shard in range(plan.shards):
            _index(plan, folder, shard, prompts, offsets)
        return cls(folder, plan, prompts, _null(folder, plan), np.array(offsets, np.int64))

    def __len__(self) -> int:
        return self.plan.number

    @property
    def times(self) -> list[float]:
        """The times of the states, descending to 0; 0 alone if no trajectories were kept."""
        return self.plan.times

    @property
    def latent(self) -> tuple[int, ...]:
        """Shape of the latents, ``(C, H, W)``."""
        return self.plan.latent

    @property
    def clip_length(self) -> int | None:
        """How many rows of a context are the condition without T5; ``None`` if T5 must stay."""
        return self.plan.clip_length

    def rows(self, step: int, batch: int, seed: int) -> list[int]:
        """Return the rows of training step ``step``: every row once per epoch, in a new order each time."""
        return sampler.batch_indices(len(self), step, batch, seed)

    def read(self, rows: Sequence[int]) -> Batch:
        """Read rows as a batch, torch float32.

        Args:
            rows: ``B`` of them from 0 to ``len - 1``, in any order.

        Returns:
            latents ``[B, C, H, W]``, context ``[B, L, D]``, pooled ``[B, P]``, the captions, and the
            trajectories ``[B, S + 1, C, H, W]`` if they were kept.

        Raises:
            UserError: a shard was removed or changed since it was indexed.
        """
        import torch

        arrays = [np.empty((len(rows), *self.plan.shape(kind)), "<f2") for kind in KINDS]
        for index, row in enumerate(rows):
            self._read(range(len(self))[row], [array[index] for array in arrays])
        states, context, pooled = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
        return Batch(
            states[:, -1],
            Cond(context, pooled),
            [self.prompts[row] for row in rows],
            states if self.plan.student_steps else None,
        )

    def without_t5(self, cond: Cond) -> Cond:
        """Return a condition without T5's tokens; the same condition if T5 must stay."""
        return Cond(cond.context[:, : self.clip_length], cond.pooled)

    def _read(self, row: int, outs: Sequence[Numpy]) -> None:
        path = self.plan.path(self.folder, row // self.plan.per_shard)
        try:
            with path.open("rb", buffering=0) as file:
                for start, out in zip(self.offsets[row], outs, strict=True):
                    file.seek(int(start))
                    if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
                        raise UserError(f"{path} was cut short while it was in use; start again")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; start again") from error


def _index(plan: Plan, folder: Path, shard: int, prompts: list[str], offsets: list[list[int]]) -> None:
    """Append the captions and the offsets of one shard's rows.

    Raises:
        UserError: the shard does not match the plan.
    """
    path = plan.path(folder, shard)
    advice = "delete it and run the same fewstep sample-teacher again"
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            members = {member.name: member for member in tar}
            size = path.stat().st_size
            if any(member.offset_data + member.size > size for member in members.values()):
                raise ValueError("a file in it is longer than the shard")
            if not members:
                raise UserError(f"{path} is empty; {advice}")
            for row in plan.rows(shard):
                key = f"{row:08d}"
                if (caption := members.get(f"{key}.txt")) is None:
                    raise UserError(f"{path}: {key} has no caption (.txt); {advice}")
                if caption.size > MAX_CAPTION_BYTES:
                    raise ValueError(f"{caption.name} has {caption.size} bytes")
                prompts.append(decode_caption(_bytes(file, caption), f"{path}: {key}.txt"))
                offsets.append([_offset(members, f"{key}.{kind}.npy", plan.shape(kind)) for kind in KINDS])
            for kind in KINDS:  # of the first row; the others are as long
                first = members[f"{plan.rows(shard)[0]:08d}.{kind}.npy"]
                try:
                    from_npy(_bytes(file, first), plan.shape(kind))
                except ValueError as error:
                    raise ValueError(f"{kind} are {error}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is cut short or not of this plan ({error}); {advice}") from error


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _offset(members: Mapping[str, tarfile.TarInfo], name: str, shape: Sequence[int]) -> int:
    """Return where the values of a float16 array of ``shape`` begin: they are the end of its file.

    Raises:
        ValueError: it is missing, or has another size.
    """
    if (member := members.get(name)) is None:
        raise ValueError(f"{name} is missing")
    header = member.size - 2 * math.prod(shape)
    if not 0 < header <= MAX_HEADER:
        raise ValueError(f"{name} is not of shape {tuple(shape)}")
    return member.offset_data + header


def _null(folder: Path, plan: Plan) -> Cond:
    import torch

    path = folder / NULL
    try:
        arrays = from_npz(path, {"context": (1, *plan.context), "pooled": (1, plan.pooled)})
        context, pooled = (arrays[kind].astype(np.float32) for kind in KINDS[1:])
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{path} is missing or broken ({error}); delete it and run the same fewstep sample-teacher again"
        ) from error
    return Cond(torch.from_numpy(context), torch.from_numpy(pooled))
