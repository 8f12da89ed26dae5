"""GGUF holds the net's tensors under the single file's names, each within a step of its kind."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tiny
from fewstep.core.types import UserError
from fewstep.export import gguf as engine
from fewstep.export.base import ExportMetadata
from fewstep.export.common.sd3_keys import net_tensors
from fewstep.families import sd3
from fewstep.families.base import Family

WIDE = tiny.SMALL | {"attention_head_dim": 32, "caption_projection_dim": 64}
"""Rows of 64: two blocks of 32."""

FACTS = ExportMetadata(license="Apache-2.0")


@pytest.fixture(scope="module")
def small() -> Family:
    return sd3.assemble(tiny.parts(WIDE, with_t5=False), name="small", steps=4, guidance=None)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], Any]:
    """Tensors as float32, the names of their kinds, and the reader."""
    reader = gguf.GGUFReader(path)
    arrays: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        arrays[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return arrays, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}, reader


def step(array: np.ndarray, bits: int) -> np.ndarray:
    """The most that a weight may move: a step of its block of 32, and the float16 rounding of its scale.

    Q8_0 rounds to a peak's 127th. Q4_0's largest weight is -8 steps, so one of the other sign and nearly as
    large is cut at 7.
    """
    peak = np.abs(array.reshape(-1, 32)).max(1, keepdims=True)
    most = peak / 127 / 2 if bits == 8 else peak / 8
    return np.broadcast_to(most + peak / 1024, (peak.size, 32)).reshape(array.shape)


@pytest.mark.parametrize("bits", engine.BITS)
def test_a_file_holds_the_nets_tensors(small: Family, tmp_path: Path, bits: int) -> None:
    engine.export(small, tmp_path / "m.gguf", bits, FACTS)
    arrays, kinds, _ = read(tmp_path / "m.gguf")
    theirs = {name: tensor.numpy() for name, tensor in net_tensors(small.parts).items()}
    assert {name: array.shape for name, array in arrays.items()} == {
        name: array.shape for name, array in theirs.items()
    }
    for name, array in theirs.items():
        if kinds[name] == "F32":
            assert np.array_equal(arrays[name], array), name
        elif kinds[name] == "F16":
            assert np.array_equal(arrays[name], array.astype(np.float16).astype(np.float32)), name
        else:
            assert (np.abs(arrays[name] - array) <= step(array, bits)).all(), name
    matrices = {name for name, array in theirs.items() if array.ndim == 2 and "joint_blocks." in name}
    assert {kinds[name] for name in matrices} == {engine.KINDS[bits]}
    assert {kinds[name] for name, array in theirs.items() if array.ndim == 1} == {"F32"}
    assert {kinds[name] for name in theirs.keys() - matrices if theirs[name].ndim > 1} == {"F16"}
    assert max(map(len, arrays)) < 64


def test_rows_that_cannot_be_cut_and_numbers_too_large_keep_their_kind() -> None:
    ones = np.ones
    assert engine.kind_of("joint_blocks.0.x_block.mlp.fc1.weight", ones((64, 48)), 8) == "F16"
    assert engine.kind_of("joint_blocks.0.x_block.mlp.fc1.weight", ones((4, 64)), 8) == "F16"
    assert engine.kind_of("joint_blocks.0.x_block.mlp.fc1.weight", ones((64, 64)), 8) == "Q8_0"
    assert engine.kind_of("joint_blocks.0.x_block.mlp.fc1.weight", 1e5 * ones((64, 64)), 8) == "F32"


def test_the_file_tells_what_it_is(small: Family, tmp_path: Path) -> None:
    line = engine.export(small, tmp_path / "m.gguf", 4, FACTS)
    assert line.endswith("the net alone, its blocks in Q4_0")
    reader = read(tmp_path / "m.gguf")[2]
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "sd3"
    assert said["general.name"] == "small"
    assert said["general.license"] == "Apache-2.0"
    assert said["general.description"] == "4 steps, no guidance (CFG 1), shift 3, euler"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert json.loads(said["fewstep"])["about"] == {"bits": 4}


def test_an_export_replaces_an_export_and_nothing_else(small: Family, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    engine.export(small, out, 8, FACTS)
    engine.export(small, out, 4, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    for data in (b"", b"me", b"mine, and longer than a header"):
        out.write_bytes(data)
        with pytest.raises(UserError, match="is no export of fewstep"):
            engine.export(small, out, 8, FACTS)
        assert out.read_bytes() == data


def test_a_full_disk_leaves_nothing(small: Family, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError):
            engine.export(small, tmp_path / "m.gguf", 8, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
