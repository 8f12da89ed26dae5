"""The bundle: a folder that holds all that generation needs, described by its ``bundle.json``.

========================  ==============================================================================
``text``                  ``tokens`` int64 ``[B, L]`` -> ``context [B, L, D]``, ``pooled [B, P]``
``t5``                    ``tokens [B, L5]`` of its own -> ``context [B, L5, D]``, which follows the other;
                          absent from a model that does without
``modulation``            ``t [B]`` in [0, 1], ``pooled`` -> ``modulation [B, M]``: all of the net that is no
                          function of the picture
``transformer``           ``x [B, C, H, W]``, ``context``, ``modulation`` -> velocity
``decoder``               ``latents [B, C, H, W]`` -> images ``[B, 3, h, w]``, about [-1, 1]
``encoder``               images ``[B, 3, h, w]`` in [-1, 1] -> latents; may be absent
``tokenizer.json``        the ``tokenizers`` library's own format, truncation and padding to ``L`` set
``tokenizer_3.json``      T5's, where it is there
``bundle.json``           name, licence, engine, shapes, time shift, steps, and the size and hash of each file
========================  ==============================================================================

The graphs are ``.onnx`` files, OpenVINO's ``.xml`` with ``.bin``, or ExecuTorch's ``.pte``, where ``B``
is 1: as the engine wants them. Weights that an ``.onnx`` file draws from another file come from one that
``bundle.json`` lists, in the same folder; what is not listed is not read. A file may be a link: the hub's
cache is made of links, and the hash is of what is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.atomic import write
from fewstep.core.types import Sampler, UserError
from fewstep.runtime.external_data import external_files

T = TypeVar("T")

FORMAT = 2
"""Of 1, the modulations were in the transformer's graph."""
MANIFEST = "bundle.json"
CARD = "README.md"
"""The model card's name, in a bundle as on the hub."""
LARGEST = 4096
"""Of the counts in a description: sides of latents, steps, tokens."""
MOST_LATENTS = 2**22
"""Numbers in the latents of one image; 4096 x 4096 pixels at 8 a latent with 16 channels have as many."""
MOST_PIXELS = 2**24
"""Of one image."""
MOST_NAME = 255
"""Bytes of a file's name."""
NEEDED = ("text", "modulation", "transformer", "decoder")
T5_TOKENIZER = "tokenizer_3.json"

Engine = Literal["onnx", "openvino", "executorch"]
SUFFIXES: Mapping[Engine, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "openvino": (".xml", ".bin"),
    "executorch": (".pte",),
}
"""What an engine's graph is made of, the file that it is loaded by first."""
Compute = Literal["float32", "bfloat16", "int8"]
"""What graphs compute in, whatever their weights are stored in; int8 are the net's matrix products alone."""


Count = Annotated[int, Meta(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class FileDigest:
    """What a file of a bundle must be: its length in bytes and its SHA-256 in hexadecimal."""

    bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _Latent:
    channels: Count
    height: Count
    width: Count
    downscale: Count


@dataclass(frozen=True)
class _Text:
    length: Count
    t5: Annotated[int, Meta(ge=0, le=LARGEST)] = 0


@dataclass(frozen=True)
class _Head:
    format: int


@dataclass(frozen=True)
class _Engine:
    engine: str = "onnx"


@dataclass(frozen=True)
class _About:
    styles: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """The shape of ``bundle.json``."""

    name: str
    family: str
    license: str
    latent: _Latent
    text: _Text
    shift: Annotated[float, Meta(ge=1e-3, le=1e3)]
    steps: Count
    guidance: Annotated[float, Meta(ge=0, le=100)] | None
    files: dict[str, FileDigest]
    engine: Engine = "onnx"
    compute: Compute = "float32"
    sampler: Sampler = "euler"
    about: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Bundle:
    """A bundle's description.

    Attributes:
        folder: where it lies.
        name: the model's name.
        family: its architecture, such as ``sd3``.
        engine: what runs its graphs.
        compute: what they compute in, where the engine has the choice and the processor can.
        license: its licence.
        latent: latent shape ``(C, H, W)``.
        downscale: pixels per latent cell along a side.
        shift: time shift of the sampling grid.
        steps: default number of steps.
        guidance: default guidance scale; ``None`` when guidance is distilled into the net.
        sampler: how a step is taken: ``euler`` or ``renoise``.
        length: tokens of a prompt, ``L``.
        t5_length: tokens of a prompt as T5 takes them; 0 without T5.
        about: free facts; ``styles`` lists the style words that the model knows.
        files: name -> what that file must be.
        digest: SHA-256 of ``bundle.json``, which names every other hash: the bundle's identity.
    """

    folder: Path
    name: str
    family: str
    engine: Engine
    compute: Compute
    license: str
    latent: tuple[int, int, int]
    downscale: int
    shift: float
    steps: int
    guidance: float | None
    sampler: Sampler
    length: int
    t5_length: int
    about: Mapping[str, Any]
    files: Mapping[str, FileDigest]
    digest: str

    @property
    def styles(self) -> tuple[str, ...]:
        """The style words that the model knows."""
        return json_io.convert(self.about, _About, str(self.folder / MANIFEST)).styles

    @property
    def size(self) -> int:
        """Bytes of all files that the description lists."""
        return sum(stamp.bytes for stamp in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """What its ``bundle.json`` tells, but ``format`` and ``files``: what :func:`write_manifest` takes."""
        facts: dict[str, Any] = json_io.read(self.folder / MANIFEST)
        return {key: value for key, value in facts.items() if key not in ("format", "files")}

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies.

        Raises:
            UserError: the bundle does not list that file.
        """
        if name not in self.files:
            raise UserError(f"model {self.name} has no {name}")
        return self.folder / name

    def graph(self, stem: str) -> Path:
        """Where a graph lies, as its engine wants to be told.

        Raises:
            UserError: the bundle does not list it, or a file that it is read with.
        """
        path, *_ = (self.path(stem + end) for end in SUFFIXES[self.engine])
        if self.engine == "onnx":
            for name in external_files(path) - self.files.keys():
                raise UserError(f"{path} reads the file {name[:80]!r}, which {MANIFEST} does not list")
        return path

    def verify(self) -> None:
        """Hash every file.

        Raises:
            UserError: a file is not the one that was described.
        """
        for name, stamp in self.files.items():
            if _sha256(self.folder / name) != stamp.sha256:
                raise UserError(f"{self.folder / name} is damaged (wrong SHA-256): fetch the model again")


def read(folder: str | Path) -> Bundle:
    """Read ``bundle.json`` and check that every file is there at its full length.

    Raises:
        UserError: no bundle, an unknown format, an incomplete description, images too large to draw, or a
            missing or cut file.
    """
    folder = Path(folder)
    try:
        data = json_io.read_bytes(folder / MANIFEST)
    except UserError as error:
        raise UserError(f"{folder} is not a model bundle: {error}") from None
    where = str(folder / MANIFEST)
    if (found := _shape(data, _Head, where).format) != FORMAT:
        hint = "export or fetch it again" if found < FORMAT else "upgrade fewstep"
        raise UserError(f"{folder} has bundle format {found}, this fewstep reads {FORMAT}: {hint}")
    if (engine := _shape(data, _Engine, where).engine) not in SUFFIXES:
        raise UserError(f"{folder} is for {engine[:40]!r}, which this fewstep does not know: upgrade it")
    facts = _shape(data, _Facts, where)
    json_io.convert(facts.about, _About, where)
    latent = facts.latent
    size = (latent.channels, latent.height, latent.width)
    if prod(size) > MOST_LATENTS or latent.height * latent.width * latent.downscale**2 > MOST_PIXELS:
        width, height = latent.width * latent.downscale, latent.height * latent.downscale
        raise UserError(
            f"{where} is for images of {width} x {height} pixels, whose latents have {latent.channels} "
            f"channels: at most {MOST_PIXELS} pixels and {MOST_LATENTS} latents are drawn"
        )
    bundle = Bundle(
        folder=folder,
        name=facts.name,
        family=facts.family,
        engine=facts.engine,
        compute=facts.compute,
        license=facts.license,
        latent=size,
        downscale=latent.downscale,
        shift=facts.shift,
        steps=facts.steps,
        guidance=facts.guidance,
        sampler=facts.sampler,
        length=facts.text.length,
        t5_length=facts.text.t5,
        about=facts.about,
        files=facts.files,
        digest=hashlib.sha256(data).hexdigest(),
    )
    _check_files(bundle)
    return bundle


def write_manifest(folder: str | Path, facts: Mapping[str, Any]) -> Bundle:
    """Turn a folder of graphs into a bundle: stamp its files and write ``bundle.json``.

    Args:
        folder: holds the graphs and the tokenizer already, and nothing that does not ship.
        facts: the fields of ``bundle.json`` but ``format`` and ``files``.

    Raises:
        UserError: as :func:`read`, which reads the result back.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in paths}
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2, ensure_ascii=False)
    write(folder / MANIFEST, f"{text}\n".encode())
    return read(folder)


def _shape(data: bytes, kind: type[T], where: str) -> T:
    try:
        return json_io.parse(data, kind, where)
    except UserError as error:
        raise UserError(f"{error}: fetch the model again") from None


def _check_files(bundle: Bundle) -> None:
    stems, others = NEEDED, ("tokenizer.json",)
    if bundle.t5_length:
        stems, others = (*stems, "t5"), (*others, T5_TOKENIZER)
    for name in (*(stem + end for stem in stems for end in SUFFIXES[bundle.engine]), *others):
        bundle.path(name)
    for name, stamp in bundle.files.items():
        if not _plain(name):  # a bundle from elsewhere must not reach out of its folder
            raise UserError(f"{bundle.folder / MANIFEST} names a file outside its folder: {name[:80]!r}")
        path = bundle.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: fetch the model again")
        size = path.stat().st_size
        if size != stamp.bytes:
            raise UserError(f"{path} has {size} bytes instead of {stamp.bytes}: fetch the model again")


def _plain(name: str) -> bool:
    """Whether a name is one file in a folder on every system."""
    windows = PureWindowsPath(name)
    apart = any(sign in name for sign in "/\\:") or name in ("", ".", "..") or windows.is_reserved()
    return name.isprintable() and not apart and len(name.encode()) <= MOST_NAME


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
