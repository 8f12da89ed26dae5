from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fewstep
from fewstep.runtime.bundle import read, seal
from fewstep.types import UserError
from tiny_bundle import FACTS, write_bundle


def edit(folder: Path, **changes: object) -> None:
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_seal_and_read_are_inverse(tmp_path: Path) -> None:
    sealed = write_bundle(tmp_path / "tiny")
    again = read(tmp_path / "tiny")
    assert again == sealed
    assert again.latent == (4, 4, 4)
    assert again.styles == ("3D", "flat")
    assert again.license == FACTS["license"]
    on_disk = [path for path in (tmp_path / "tiny").iterdir() if path.name != "bundle.json"]
    assert again.size == sum(path.stat().st_size for path in on_disk)
    again.verify()


def test_digest_tells_bundles_apart(tmp_path: Path) -> None:
    one, same, other = (
        write_bundle(tmp_path / str(index), shift=shift).digest for index, shift in enumerate((3.0, 3.0, 2.0))
    )
    assert one == same != other


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda at: (at / "bundle.json").unlink(), "neither bundle.json nor"),
    "no JSON": (lambda at: (at / "bundle.json").write_text("{"), "not JSON"),
    "no object": (lambda at: (at / "bundle.json").write_text("[]"), "names no format"),
    "other format": (lambda at: edit(at, format=99), "bundle format 99"),
    "no latent": (lambda at: edit(at, latent=None), "incomplete or damaged"),
    "odd latent": (lambda at: edit(at, latent={**FACTS["latent"], "height": -4}), "incomplete or damaged"),
    "huge latent": (
        lambda at: edit(at, latent={**FACTS["latent"], "height": 10**11}),
        "incomplete or damaged",
    ),
    "endless latent": (
        lambda at: edit(at, latent={**FACTS["latent"], "height": 1e999}),
        "incomplete or damaged",
    ),
    "deep JSON": (lambda at: (at / "bundle.json").write_text("[" * 100_000), "not JSON"),
    "odd styles": (lambda at: edit(at, about={"styles": 5}), "incomplete or damaged"),
    "odd arithmetic": (lambda at: edit(at, compute="int3"), "incomplete or damaged"),
    "no files": (lambda at: edit(at, files={}), "no text.onnx"),
    "missing file": (lambda at: (at / "text.onnx").unlink(), "text.onnx is missing"),
    "cut file": (lambda at: (at / "decoder.onnx").write_bytes(b"x" * 100), "has 100 bytes instead of"),
    "wrong hash": (lambda at: flip(at / "transformer.onnx"), "wrong SHA-256"),
    "wrong tokenizer": (lambda at: flip(at / "tokenizer.json"), "wrong SHA-256"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    write_bundle(tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        fewstep.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_graph_in_anothers_place_is_one_clear_line(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    (tmp_path / "text.onnx").write_bytes((tmp_path / "decoder.onnx").read_bytes())
    facts = json.loads((tmp_path / "bundle.json").read_text())
    seal(tmp_path, {name: value for name, value in facts.items() if name not in ("format", "files")})
    with pytest.raises(UserError, match=r"text\.onnx does not fit its bundle"):
        fewstep.load(tmp_path)("a cat")


def test_a_bundle_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    files = json.loads((tmp_path / "bundle.json").read_text())["files"]
    edit(tmp_path, files={**files, "../secret": files["text.onnx"]})
    with pytest.raises(UserError, match="outside its folder"):
        read(bundle.folder)
