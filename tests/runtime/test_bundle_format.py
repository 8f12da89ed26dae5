from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import fewstep
from fewstep.core.types import UserError
from fewstep.runtime.bundle import read, write_manifest
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


LATENT = FACTS["latent"]

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda at: (at / "bundle.json").unlink(), "neither bundle.json nor"),
    "no JSON": (lambda at: (at / "bundle.json").write_text("{"), "not JSON"),
    "no object": (lambda at: (at / "bundle.json").write_text("[]"), "expected object, got array"),
    "no format": (lambda at: (at / "bundle.json").write_text("{}"), "missing required field format"),
    "other format": (lambda at: edit(at, format=99), "bundle format 99"),
    "odd format": (lambda at: edit(at, format="2"), "format: expected int, got str"),
    "other engine": (lambda at: edit(at, engine="abacus"), "for 'abacus', which this fewstep does not know"),
    "odd engine": (lambda at: edit(at, engine=[1]), "engine: expected str"),
    "no latent": (lambda at: edit(at, latent=None), "latent: expected object, got null"),
    "odd latent": (lambda at: edit(at, latent={**LATENT, "height": -4}), "latent.height: expected int >= 1"),
    "huge latent": (
        lambda at: edit(at, latent={**LATENT, "height": 10**11}),
        "latent.height: expected int <=",
    ),
    "endless latent": (lambda at: edit(at, latent={**LATENT, "height": 1e999}), "damaged"),
    "latents of 256 GiB": (
        lambda at: edit(at, latent={"channels": 4096, "height": 4096, "width": 4096, "downscale": 8}),
        "at most .* latents",
    ),
    "pixels of 3 TiB": (
        lambda at: edit(at, latent={"channels": 1, "height": 128, "width": 128, "downscale": 4096}),
        "at most .* pixels",
    ),
    "endless shift": (lambda at: edit(at, shift=1e300), "shift: expected float <="),
    "shift that is no number": (lambda at: edit(at, shift=float("nan")), "not JSON"),
    "deep JSON": (lambda at: (at / "bundle.json").write_text('{"a":' + "[" * 100_000), "damaged"),
    "odd styles": (lambda at: edit(at, about={"styles": 5}), "styles: expected array, got int"),
    "odd style": (lambda at: edit(at, about={"styles": [5]}), "expected str, got int"),
    "odd arithmetic": (lambda at: edit(at, compute="int3"), "compute: invalid enum value"),
    "odd hash": (
        lambda at: edit(at, files={"text.onnx": {"bytes": 1, "sha256": "../" * 20}}),
        "sha256: expected str matching",
    ),
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
    write_manifest(
        tmp_path, {name: value for name, value in facts.items() if name not in ("format", "files")}
    )
    with pytest.raises(UserError, match=r"text\.onnx does not fit its bundle"):
        fewstep.load(tmp_path)("a cat")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "sub/text.onnx", r"..\secret", "C:secret", "..", ".", "", "nul.onnx", "a\0b",
     "a\nb", "é" * 200],
)  # fmt: skip
def test_a_bundle_cannot_reach_out_of_its_folder(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path)
    files = json.loads((tmp_path / "bundle.json").read_text())["files"]
    edit(tmp_path, files={**files, name: files["text.onnx"]})
    with pytest.raises(UserError, match="outside its folder"):
        read(bundle.folder)
