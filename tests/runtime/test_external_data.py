"""No engine reads a file that ``bundle.json`` does not list, wherever a graph names it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import fewstep
from fewstep.core.types import UserError
from fewstep.runtime.bundle import Bundle, read, write_manifest
from fewstep.runtime.external_data import external_files
from tiny_bundle import FACTS, write_bundle, write_openvino_bundle

KERNEL = "kernel"
"""The initializer of the tiny decoder's convolution."""


def outside(tensor: TensorProto, location: str, folder: Path) -> None:
    """Move the numbers of a tensor into a file, as ``onnx.save_tensor`` does."""
    data = onnx.numpy_helper.to_array(tensor).tobytes()
    if location and not location.startswith(("/", "..")):
        (folder / location).parent.mkdir(exist_ok=True)
        (folder / location).write_bytes(data)
    for name in ("raw_data", "float_data"):
        tensor.ClearField(name)  # pyright: ignore[reportArgumentType]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)


def as_initializer(model: Any, location: str, folder: Path) -> None:
    outside(next(weight for weight in model.graph.initializer if weight.name == KERNEL), location, folder)


def as_constant(model: Any, location: str, folder: Path) -> None:
    as_initializer(model, location, folder)
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], [KERNEL], value=weight))


def in_a_branch(model: Any, location: str, folder: Path) -> None:
    as_initializer(model, location, folder)
    weight = model.graph.initializer.pop()
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", [KERNEL], ["out"])], "b", [], [out], [weight])
    always = onnx.numpy_helper.from_array(np.array(True), "always")
    model.graph.initializer.append(always)
    node = helper.make_node("If", ["always"], [KERNEL], then_branch=branch, else_branch=branch)
    model.graph.node.insert(0, node)


def behind_a_cut_off_copy(model: Any, location: str, folder: Path) -> None:
    """The key is told twice: what counts is that it is told."""
    as_initializer(model, location, folder)
    for weight in model.graph.initializer:
        if weight.name == KERNEL:
            weight.external_data.add(key="location", value=location)


def in_sparse(model: Any, location: str, folder: Path) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    sparse.dims.extend([4])
    outside(sparse.values, location, folder)


PLACES: tuple[Callable[[Any, str, Path], None], ...] = (
    as_initializer, as_constant, in_a_branch, behind_a_cut_off_copy, in_sparse,
)  # fmt: skip


def hostile(
    folder: Path, stem: str = "decoder", location: str = "w.data", place: Any = as_initializer
) -> Path:
    """A bundle one of whose graphs draws weights from a file; its hashes are right."""
    write_bundle(folder)
    path = folder / f"{stem}.onnx"
    model = onnx.load(str(path))
    place(model, location, folder)
    path.write_bytes(model.SerializeToString())
    reseal(folder)
    return path


def reseal(folder: Path, without: tuple[str, ...] = ("w.data", "sub"), **changes: Any) -> Bundle:
    kept = {name: (folder / name).read_bytes() for name in without if (folder / name).is_file()}
    for name in kept:
        (folder / name).unlink()
    try:
        return write_manifest(folder, {**FACTS, **changes})
    finally:
        for name, data in kept.items():
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_an_unlisted_file_are_not_read(tmp_path: Path, place: Any) -> None:
    path = hostile(tmp_path, place=place)
    assert external_files(path) == {"w.data"}
    with pytest.raises(UserError, match=r"decoder\.onnx reads the file 'w.data', which bundle.json does not"):
        fewstep.load(tmp_path)


@pytest.mark.parametrize("location", ["sub/w.data", "../w.data", "/etc/passwd", "./w.data", "W.data", ""])
def test_no_other_name_of_a_file_will_do(tmp_path: Path, location: str) -> None:
    """Even where the file that it may mean is listed."""
    folder = tmp_path / "tiny"
    hostile(folder, location=location)
    (folder / "W.data").unlink(missing_ok=True)
    (folder / "w.data").write_bytes(bytes(4 * 3 * 64 * 4))
    reseal(folder, without=())
    with pytest.raises(UserError, match="does not list"):
        fewstep.load(folder)


@pytest.mark.parametrize("stem", ["decoder", "encoder"])
def test_a_graph_that_is_loaded_later_is_looked_at_too(tmp_path: Path, stem: str) -> None:
    hostile(tmp_path, stem)
    with pytest.raises(UserError, match="does not list"):
        fewstep.load(tmp_path)("a cat", image=fewstep.load(write_bundle(tmp_path / "b").folder)("a dog")[0])


def test_weights_in_a_listed_file_are_read_and_hashed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "whole")
    whole = fewstep.load(tmp_path / "whole")("a cat", seed=0)[0]
    folder = tmp_path / "apart"
    hostile(folder)
    reseal(folder, without=())
    assert fewstep.load(folder)("a cat", seed=0)[0].tobytes() == whole.tobytes()
    data = (folder / "w.data").read_bytes()
    (folder / "w.data").write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="wrong SHA-256"):
        fewstep.load(folder)


def test_a_name_that_only_sounds_like_the_key_is_no_file(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    path = tmp_path / "decoder.onnx"
    model = onnx.load(str(path))
    model.graph.node[0].name = "allocation/location"
    model.graph.doc_string = "location" * 2000
    path.write_bytes(model.SerializeToString())
    assert external_files(path) == set()
    reseal(tmp_path)
    assert fewstep.load(tmp_path)("a cat")


def test_what_is_no_graph_is_one_line(tmp_path: Path) -> None:
    for name, data in (
        ("empty", b""),
        ("text", b"not a graph"),
        ("group", b"\x3b\x3c"),
        ("cut", b"\x3a\xff\x7f"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="it is no ONNX graph"):
            external_files(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        external_files(tmp_path / "none")


def _split(data: bytes) -> tuple[bytes, bytes]:
    """The fields of a model before its graph, and the graph; the graph is the last field but one."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    return model.SerializeToString(), graph


HIDING = {
    "a tag beyond 32 bits": b"\xba\x80\x80\x80\x10",
    "a tag of too many bytes": b"\xba\x80\x00",
    "a tag of ten bytes": b"\xba" + b"\x80" * 8 + b"\x01",
    "field 0": b"\x02",
    "another field": b"\xfa\x01",
    "a group": b"\x3b",
}


@pytest.mark.parametrize("how", HIDING)
def test_a_graph_under_a_tag_that_engines_may_read_otherwise_is_refused(tmp_path: Path, how: str) -> None:
    path = hostile(tmp_path)
    rest, graph = _split(path.read_bytes())
    path.write_bytes(rest + HIDING[how] + _varint(len(graph)) + graph)
    with pytest.raises(UserError, match="cannot be checked"):
        external_files(path)


def test_a_length_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = hostile(tmp_path)
    rest, graph = _split(path.read_bytes())
    size = _varint(len(graph))
    path.write_bytes(rest + b"\x3a" + size[:-1] + bytes([size[-1] | 128, 0]) + graph)
    with pytest.raises(UserError, match="cannot be checked"):
        external_files(path)


def test_a_graph_in_two_parts_is_read_whole(tmp_path: Path) -> None:
    """protobuf merges the parts of a message that is not repeated."""
    path = hostile(tmp_path)
    rest, graph = _split(path.read_bytes())
    whole = onnx.GraphProto.FromString(graph)
    weights = onnx.GraphProto(initializer=whole.initializer)
    whole.ClearField("initializer")
    parts = [part.SerializeToString() for part in (whole, weights)]
    path.write_bytes(rest + b"".join(b"\x3a" + _varint(len(part)) + part for part in parts))
    assert external_files(path) == {"w.data"}


@pytest.fixture(scope="module")
def outer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return hostile(tmp_path_factory.mktemp("outer")).read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_change_of_bytes_hides_a_file_from_the_scan(outer: bytes, data: st.DataObject) -> None:
    """What protobuf's own parser finds in a changed file, the scan finds too, or it refuses the file."""
    key = outer.index(b"location")
    changed = bytearray(outer)
    for _ in range(data.draw(st.integers(1, 3))):
        near = st.integers(max(0, key - 60), key + 20) | st.integers(0, len(outer) - 1)
        at = data.draw(near) % len(changed)
        new = data.draw(st.binary(max_size=6) | st.sampled_from(list(HIDING.values())))
        changed[at : at + data.draw(st.integers(0, 3))] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(changed)
        try:
            found = external_files(path)
        except UserError:
            return
    try:
        model = onnx.ModelProto.FromString(bytes(changed))
    except DecodeError:
        return
    entries = [entry for weight in model.graph.initializer for entry in weight.external_data]
    named = [entry.value for entry in entries if entry.key == "location"]
    plain = {name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name for name in named}
    assert plain <= found


def test_messages_in_messages_without_an_end_are_one_line(tmp_path: Path) -> None:
    """``node.attribute.g.node`` and so on, each message a few bytes in the next."""
    data = b"location"
    for number in range(400):
        tag = (0x0A, 0x32, 0x2A)[number % 3]  # from the inside: attribute.g, node.attribute, graph.node
        data = bytes([tag]) + _varint(len(data)) + data
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + _varint(len(data)) + data)
    with pytest.raises(UserError, match="nested too deeply"):
        external_files(tmp_path / "deep.onnx")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_a_detector_of_scenes_has_all_its_weights_in_it(tmp_path: Path) -> None:
    from fewstep.pocket.detector import BoxDetector

    graph = hostile(tmp_path)
    shutil.copyfile(graph, tmp_path / "detector.onnx")
    (tmp_path / "detector.json").write_text(json.dumps({"size": 32}))
    with pytest.raises(UserError, match=r"detector\.onnx reads the file 'w.data'"):
        BoxDetector(tmp_path)


def test_openvino_reads_no_onnx_graph_that_is_named_xml(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    graph = hostile(tmp_path / "onnx")
    folder = tmp_path / "openvino"
    write_openvino_bundle(folder)
    shutil.copyfile(graph, folder / "decoder.xml")
    shutil.copyfile(graph.parent / "w.data", folder / "w.data")
    reseal(folder, engine="openvino")
    with pytest.raises(UserError, match=r"decoder\.xml cannot be loaded by OpenVINO"):
        fewstep.load(folder)("a cat")


@pytest.mark.parametrize("stem", ["decoder", "encoder"])
def test_openvinos_weights_are_listed_too(tmp_path: Path, stem: str) -> None:
    pytest.importorskip("openvino")
    write_openvino_bundle(tmp_path)
    manifest = tmp_path / "bundle.json"
    facts = json.loads(manifest.read_text())
    del facts["files"][f"{stem}.bin"]
    manifest.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"model tiny has no {stem}\.bin"):
        pipe = fewstep.load(tmp_path)
        pipe("a cat", image=pipe("a cat")[0])


def test_a_bundle_of_links_is_read_as_the_hub_stores_it(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "blobs")
    (tmp_path / "links").mkdir()
    for path in bundle.folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert read(tmp_path / "links").digest == bundle.digest
    assert fewstep.load(tmp_path / "links")("a cat")
