"""The files of a checkpoint: an index in JSON, and the raw values of tensors.

Torch's distributed checkpoints (DCP) plan which process writes and reads what. DCP's own reader unpickles,
which can execute code. This one reads JSON and raw values only.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import torch
from msgspec import Meta
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fewstep.core.json_io import MOST_BYTES, parse
from fewstep.core.types import UserError

INDEX = ".metadata"
LAYOUT = 1
"""Version of the index; it goes up when older readers could not read it."""

Dtype = Literal[
    "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
T = TypeVar("T")
Count = Annotated[int, Meta(ge=0)]


class Damaged(Exception):
    """A checkpoint is broken: a part is missing, cut short or has other bytes than were written."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where its values are stored.

    Attributes:
        offsets: of the part in the tensor.
        sizes: of the part.
        file: name of a file of the checkpoint.
        start: offset of the values in that file, bytes.
        crc32: checksum of the values.
    """

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    file: Annotated[str, Meta(pattern=r"^__[0-9]+_0\.distcp\Z")]
    start: Count
    crc32: Count


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, in parts."""

    dtype: Dtype
    size: tuple[Count, ...]
    chunks: list[Chunk]


@dataclass(frozen=True)
class Index:
    """The content of a checkpoint's index."""

    layout: int
    tensors: dict[str, Tensor]


class Writer(StorageWriter):
    """Writes a checkpoint into a folder that is there; tensors only.

    Args:
        folder: the same one for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name: str = plan.storage_data
        results: list[WriteResult] = []
        with (self.folder / name).open("wb") as file:
            for item in plan.items:
                tensor = planner.resolve_data(item)
                if not isinstance(tensor, torch.Tensor):
                    raise TypeError(f"{item.index.fqn} is no tensor")
                data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                results.append(WriteResult(item.index, len(data), (name, file.tell(), zlib.crc32(data))))
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places: dict[MetadataIndex, tuple[str, int, int]] = {
            r.index: r.storage_data for part in results for r in part
        }
        tensors: dict[str, Tensor] = {}
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), key  # write_data has refused anything else
            dtype = cast(Dtype, str(stored.properties.dtype).removeprefix("torch."))
            if dtype not in get_args(Dtype):
                raise TypeError(f"{key} is of {stored.properties.dtype}, which checkpoints do not hold")
            chunks = [
                Chunk(tuple(box.offsets), tuple(box.sizes), *places[MetadataIndex(key, box.offsets)])
                for box in stored.chunks
            ]
            tensors[key] = Tensor(dtype, tuple(stored.size), chunks)
        with (self.folder / INDEX).open("w") as file:
            json.dump(asdict(Index(LAYOUT, tensors)), file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads a checkpoint that :class:`Writer` wrote.

    Args:
        folder: of the checkpoint.

    Raises:
        Damaged: its index is.
        OSError: its index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return Metadata(
            {key: _metadata(tensor) for key, tensor in self.index.tensors.items()}, storage_data={}
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan.

        Raises:
            Damaged: a file is missing, cut short or has other bytes.
            OSError: a file cannot be read.
        """
        for item in plan.items:
            tensor = self.index.tensors[item.storage_index.fqn]
            offsets = tuple(item.storage_index.offset or ())
            chunk = next(chunk for chunk in tensor.chunks if chunk.offsets == offsets)
            box = self._read(chunk, getattr(torch, tensor.dtype))
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                box = box.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(box)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _read(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(chunk.sizes) * dtype.itemsize
        if not size:
            return torch.empty(chunk.sizes, dtype=dtype)
        data = read_bytes(self.folder / chunk.file, size, chunk.start)
        if len(data) < size:
            raise Damaged(f"{chunk.file} is cut short")
        if zlib.crc32(data) != chunk.crc32:
            raise Damaged(f"{chunk.file} has other bytes than were written")
        return torch.frombuffer(data, dtype=dtype).reshape(chunk.sizes)


def read_bytes(path: Path, most: int, start: int = 0) -> bytearray:
    """Read at most ``most`` bytes of a file of a checkpoint, from ``start`` on.

    Raises:
        Damaged: there is no such file.
        OSError: it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise Damaged(f"{path.name} is no file")
        with path.open("rb") as file:
            if start > os.fstat(file.fileno()).st_size:
                raise Damaged(f"{path.name} is cut short")
            file.seek(start)
            return bytearray(file.read(most))
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path.name} is missing") from None


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _read_index(folder: Path) -> Index:
    data = bytes(read_bytes(folder / INDEX, MOST_BYTES))
    try:
        index: Index = parse(data, Index, INDEX)
    except UserError as error:
        raise Damaged(str(error)) from None
    if index.layout != LAYOUT:
        raise Damaged(f"{INDEX} is of layout {index.layout}, which is not read here")
    for key, tensor in index.tensors.items():
        if not _covered(tensor):
            raise Damaged(f"{INDEX} is damaged: the parts of {key} are not the whole of it")
    return index


def _covered(tensor: Tensor) -> bool:
    """Return whether the parts of a tensor, cut along its first dimension as FSDP does, are all of it."""
    if any(not len(box.offsets) == len(box.sizes) == len(tensor.size) for box in tensor.chunks):
        return False
    boxes = sorted((box for box in tensor.chunks if math.prod(box.sizes)), key=lambda box: box.offsets)
    if not tensor.size:
        return len(boxes) == 1
    rows = 0
    for box in boxes:
        if box.offsets != (rows, *(0 for _ in tensor.size[1:])) or box.sizes[1:] != tensor.size[1:]:
            return False
        rows += box.sizes[0]
    return rows == tensor.size[0] or not math.prod(tensor.size)


def _metadata(tensor: Tensor) -> TensorStorageMetadata:
    boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
    properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
    return TensorStorageMetadata(properties, torch.Size(tensor.size), boxes)
