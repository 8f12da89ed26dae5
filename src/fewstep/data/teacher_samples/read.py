"""Samples of a teacher, any row at any time, from the disk: only captions and places are held in memory."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fewstep.core.prompt_text import decode_caption
from fewstep.core.types import Batch, Cond, UserError
from fewstep.data import sampler
from fewstep.data.npy import LONGEST_HEAD, from_npy, from_npz
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.manifest import NULL, Plan

KINDS = ("states", "context", "pooled")
LONGEST_CAPTION = 2**20
"""Bytes."""

Numpy = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TeacherSamples:
    """The finished shards of one plan; :meth:`open` reads them.

    Attributes:
        folder: where they lie.
        plan: by which they were made.
        prompts: captions, ``N``.
        null: the empty prompt's condition, one row, torch float32: what guidance goes away from.
        places: where each row's arrays begin in its shard, in bytes, int64 ``[N, 3]`` (:data:`KINDS`).
    """

    folder: Path
    plan: Plan
    prompts: list[str]
    null: Cond
    places: Numpy

    @classmethod
    def open(cls, folder: str | Path) -> TeacherSamples:
        """Index a folder of ``fewstep sample-teacher``, some 0.1 ms a sample; no array is read.

        Raises:
            UserError: it is no such folder or an unfinished one, or a shard is cut short, empty, of another
                plan or without a caption.
        """
        folder = Path(folder)
        plan = manifest.read(folder)
        # Files are counted, not numbers: a plan may say that there are a thousand million.
        names = {path.name for path in folder.glob("synthetic-*.tar") if path.is_file()}
        there = min(len(names), plan.shards)
        if there < plan.shards or any(plan.path(folder, k).name not in names for k in range(there)):
            raise UserError(
                f"{folder}: {there} of {plan.shards} shards are there; "
                "run the same fewstep sample-teacher again"
            )
        prompts: list[str] = []
        places: list[list[int]] = []
        for shard in range(plan.shards):
            _index(plan, folder, shard, prompts, places)
        return cls(folder, plan, prompts, _null(folder, plan), np.array(places, np.int64))

    def __len__(self) -> int:
        return self.plan.number

    @property
    def times(self) -> list[float]:
        """Of the states, descending to 0; 0 alone where no walks were kept."""
        return self.plan.times

    @property
    def latent(self) -> tuple[int, ...]:
        """Shape of the latents, ``(C, H, W)``."""
        return self.plan.latent

    @property
    def clip_length(self) -> int | None:
        """The first rows of a context that make the condition without T5; ``None`` where T5 must stay."""
        return self.plan.clip_length

    def rows(self, step: int, batch: int, seed: int) -> list[int]:
        """Which rows step ``step`` sees: every row once an epoch, in a new order each time."""
        return sampler.batch_indices(len(self), step, batch, seed)

    def read(self, rows: Sequence[int]) -> Batch:
        """Rows from the disk, torch float32.

        Args:
            rows: ``B`` of them from 0 to ``len - 1``, in any order.

        Returns:
            latents ``[B, C, H, W]``, context ``[B, L, D]``, pooled ``[B, P]``, the captions, and where walks
            were kept the states ``[B, S + 1, C, H, W]``.

        Raises:
            UserError: a shard was taken away or changed since it was indexed.
        """
        import torch

        arrays = [np.empty((len(rows), *self.plan.shape(kind)), "<f2") for kind in KINDS]
        for place, row in enumerate(rows):
            self._read(range(len(self))[row], [array[place] for array in arrays])
        states, context, pooled = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
        return Batch(
            states[:, -1],
            Cond(context, pooled),
            [self.prompts[row] for row in rows],
            states if self.plan.student_steps else None,
        )

    def without_t5(self, cond: Cond) -> Cond:
        """A condition of these shards as the text encoders but T5 make it; the same where T5 must stay."""
        return Cond(cond.context[:, : self.clip_length], cond.pooled)

    def _read(self, row: int, outs: Sequence[Numpy]) -> None:
        path = self.plan.path(self.folder, row // self.plan.per_shard)
        try:
            with path.open("rb", buffering=0) as file:
                for start, out in zip(self.places[row], outs, strict=True):
                    file.seek(int(start))
                    if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
                        raise UserError(f"{path} was cut short while it was in use; start again")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; start again") from error


def _index(plan: Plan, folder: Path, shard: int, prompts: list[str], places: list[list[int]]) -> None:
    """Append the captions and the places of one shard's rows.

    Raises:
        UserError: it is not what the plan says.
    """
    path = plan.path(folder, shard)
    again = "delete it and run the same fewstep sample-teacher again"
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            members = {member.name: member for member in tar}
            size = path.stat().st_size
            if any(member.offset_data + member.size > size for member in members.values()):
                raise ValueError("a file in it goes on behind its end")
            if not members:
                raise UserError(f"{path} is empty; {again}")
            for row in plan.rows(shard):
                key = f"{row:08d}"
                if (caption := members.get(f"{key}.txt")) is None:
                    raise UserError(f"{path}: {key} has no caption (.txt); {again}")
                if caption.size > LONGEST_CAPTION:
                    raise ValueError(f"{caption.name} has {caption.size} bytes")
                prompts.append(decode_caption(_bytes(file, caption), f"{path}: {key}.txt"))
                places.append([_place(members, f"{key}.{kind}.npy", plan.shape(kind)) for kind in KINDS])
            for kind in KINDS:  # of the first row; the others are as long
                first = members[f"{plan.rows(shard)[0]:08d}.{kind}.npy"]
                try:
                    from_npy(_bytes(file, first), plan.shape(kind))
                except ValueError as error:
                    raise ValueError(f"{kind} are {error}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is cut short or not of this plan ({error}); {again}") from error


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _place(members: Mapping[str, tarfile.TarInfo], name: str, shape: Sequence[int]) -> int:
    """Where the numbers of a float16 array of ``shape`` begin: they are the end of its file.

    Raises:
        ValueError: it is missing, or its size is another's.
    """
    if (member := members.get(name)) is None:
        raise ValueError(f"{name} is missing")
    head = member.size - 2 * math.prod(shape)
    if not 0 < head <= LONGEST_HEAD:
        raise ValueError(f"{name} is not of shape {tuple(shape)}")
    return member.offset_data + head


def _null(folder: Path, plan: Plan) -> Cond:
    import torch

    path = folder / NULL
    try:
        read = from_npz(path, {"context": (1, *plan.context), "pooled": (1, plan.pooled)})
        context, pooled = (read[kind].astype(np.float32) for kind in KINDS[1:])
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(
            f"{path} is missing or broken ({error}); delete it and run the same fewstep sample-teacher again"
        ) from error
    return Cond(torch.from_numpy(context), torch.from_numpy(pooled))
