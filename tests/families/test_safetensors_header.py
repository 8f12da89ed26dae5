"""What a ``.safetensors`` header says lies in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.core.types import UserError
from fewstep.families.safetensors_header import MOST_BYTES, read_header


def write(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {str(kind): torch.zeros(3, 2, dtype=kind) for kind in kinds} | {"none": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    head = read_header(tmp_path / "x.safetensors")
    assert {name: fact.shape for name, fact in head.tensors.items()} == {
        name: tuple(each.shape) for name, each in tensors.items()
    }
    assert head.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(shape=(2**31, 2**31))},
        {"a": tensor(end=2**40, shape=(2**38,))},
        {"a": tensor(shape=(-4,))},
        {"a": tensor(0, 16), "b": tensor(8, 24)},
        {"a": tensor(60, 76)},
        {"a": tensor(16, 0)},
        {"a": tensor(0, 8)},
        {"a": tensor(dtype="F33")},
        {"a": tensor(dtype=3)},
        {"a": []},
        {"a": {}},
        [],
        {"__metadata__": {"a": 1}},
        {"a": {**tensor(), "shape": [2**70]}},
        b"",
        b"{",
        b"[" * 10**5,
        b'{"a":' * 10**4,
        b"\xff" * 9,
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, header: Any) -> None:
    with pytest.raises(UserError, match=r"x\.safetensors") as caught:
        read_header(write(tmp_path / "x.safetensors", header))
    assert "\n" not in str(caught.value)


def test_lengths_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"", b"\0" * 7, b"\xff" * 8, (10**8).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cut off"):
            read_header(path)
    with path.open("wb") as file:
        file.write((MOST_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MOST_BYTES + 100)
    with pytest.raises(UserError, match="at most"):
        read_header(path)
