"""Reads and writes bundles: folders with all files that generation needs, described by ``bundle.json``.

========================  ==============================================================================
``text``                  ``tokens`` int64 ``[B, L]`` -> ``context [B, L, D]``, ``pooled [B, P]``
``t5``                    ``tokens [B, L5]`` of its own -> ``context [B, L5, D]``, which follows the other;
                          absent from a model without T5
``modulation``            ``t [B]`` in [0, 1], ``pooled`` -> ``modulation [B, M]``: what does not depend on
                          the latents
``transformer``           ``x [B, C, H, W]``, ``context``, ``modulation`` -> velocity
``decoder``               ``latents [B, C, H, W]`` -> images ``[B, 3, h, w]``, about [-1, 1]
``encoder``               images ``[B, 3, h, w]`` in [-1, 1] -> latents; may be absent
``tokenizer.json``        the ``tokenizers`` library's own format, truncation and padding to ``L`` set
``tokenizer_3.json``      T5's, if the model has T5
``bundle.json``           name, licence, engine, shapes, time shift, steps, and the size and hash of each file
========================  ==============================================================================

The graphs are files of the bundle's engine: ``.onnx`` files, OpenVINO's ``.xml`` with ``.bin``, or
ExecuTorch's ``.pte``, where ``B`` is 1. External weights of an ``.onnx`` file are in a file of the same
folder that ``bundle.json`` lists. A file that is not listed is not read. A file may be a link, as in the
hub's cache. The hash is that of its target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
"""Version of the format. In version 1 the modulations were in the transformer's graph."""
MANIFEST = "bundle.json"
CARD = "README.md"
"""The model card's name, in a bundle as on the hub."""
LARGEST = 4096
"""Most of each count in a description: sides of latents, steps, tokens."""
MOST_LATENTS = 2**22
"""Numbers in the latents of one image; 4096 x 4096 pixels at 8 a latent with 16 channels have as many."""
MOST_PIXELS = 2**24
"""Most pixels of one image."""
MOST_NAME = 255
"""Most bytes of a file's name."""
NEEDED = ("text", "modulation", "transformer", "decoder")
T5_TOKENIZER = "tokenizer_3.json"

Engine = Literal["onnx", "openvino", "executorch"]
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "openvino": (".xml", ".bin"),
    "executorch": (".pte",),
}
"""Endings of the files of an engine's graph. The first file is the one that is loaded."""
Compute = Literal["float32", "bfloat16", "int8"]
"""Types that graphs compute in, whatever stores their weights. int8 is for the net's matrix products."""


Count = Annotated[int, Meta(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class FileDigest:
    """The length of a file in bytes and its SHA-256 in hexadecimal."""

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
    engine: str = "onnx"
    compute: Compute = "float32"
    sampler: Sampler = "euler"
    about: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Bundle:
    """A bundle's description.

    Attributes:
        folder: the bundle's folder.
        name: the model's name.
        family: its architecture, such as ``sd3``.
        engine: the engine that runs its graphs.
        suffixes: endings of the files of a graph.
        compute: type that the graphs compute in, if the engine offers it and the processor has it.
        license: the licence of the weights.
        latent: latent shape ``(C, H, W)``.
        downscale: pixels per latent cell along a side.
        shift: time shift of the sampling grid.
        steps: default number of steps.
        guidance: default guidance scale; ``None`` when guidance is distilled into the net.
        sampler: the solver step: ``euler`` or ``renoise``.
        length: tokens of a prompt, ``L``.
        t5_length: tokens of a prompt for T5; 0 without T5.
        about: free facts; ``styles`` lists the style words of the model.
        files: name -> expected length and hash.
        digest: SHA-256 of ``bundle.json``, which names every other hash: the bundle's identity.
    """

    folder: Path
    name: str
    family: str
    engine: str
    suffixes: tuple[str, ...]
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
    about: Mapping[str, object]
    files: Mapping[str, FileDigest]
    digest: str

    @property
    def styles(self) -> tuple[str, ...]:
        """The style words of the model."""
        return json_io.convert(self.about, _About, str(self.folder / MANIFEST)).styles

    @property
    def size(self) -> int:
        """Bytes of all files that the description lists."""
        return sum(digest.bytes for digest in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of ``bundle.json`` but ``format`` and ``files`` (:func:`write_manifest`)."""
        facts: dict[str, Any] = json_io.read(self.folder / MANIFEST)
        return {key: value for key, value in facts.items() if key not in ("format", "files")}

    def path(self, name: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            UserError: the bundle does not list that file.
        """
        if name not in self.files:
            raise UserError(f"model {self.name} has no {name}")
        return self.folder / name

    def graph(self, stem: str) -> Path:
        """Return the path of the file that a graph is loaded from.

        Raises:
            UserError: the bundle does not list the graph, or a file with its weights.
        """
        path, *_ = (self.path(stem + end) for end in self.suffixes)
        if self.engine == "onnx":
            for name in external_files(path) - self.files.keys():
                raise UserError(f"{path} reads the file {name[:80]!r}, which {MANIFEST} does not list")
        return path

    def verify(self) -> None:
        """Hash every file.

        Raises:
            UserError: the hash of a file differs from the described one.
        """
        for name, digest in self.files.items():
            if _sha256(self.folder / name) != digest.sha256:
                raise UserError(f"{self.folder / name} is damaged (wrong SHA-256): fetch the model again")


def read(folder: str | Path, suffixes: Mapping[str, Sequence[str]] = SUFFIXES) -> Bundle:
    """Read ``bundle.json`` and check that every file is there at its full length.

    Args:
        folder: the bundle's folder.
        suffixes: endings of a graph's files by engine; a bundle for another engine is refused.

    Raises:
        UserError: the folder is no bundle, the format or engine is unknown, the description is incomplete,
            the images are too large, or a file is missing or cut.
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
    if (engine := _shape(data, _Engine, where).engine) not in suffixes:
        hint = "upgrade it, or give the engine with --backend"
        raise UserError(f"{folder} is for {engine[:40]!r}, which this fewstep does not know: {hint}")
    facts = _shape(data, _Facts, where)
    json_io.convert(facts.about, _About, where)
    latent = facts.latent
    size = (latent.channels, latent.height, latent.width)
    if prod(size) > MOST_LATENTS or latent.height * latent.width * latent.downscale**2 > MOST_PIXELS:
        width, height = latent.width * latent.downscale, latent.height * latent.downscale
        raise UserError(
            f"{where} is for images of {width} x {height} pixels, whose latents have {latent.channels} "
            f"channels: at most {MOST_PIXELS} pixels and {MOST_LATENTS} latents are generated"
        )
    bundle = Bundle(
        folder=folder,
        name=facts.name,
        family=facts.family,
        engine=facts.engine,
        suffixes=tuple(suffixes[facts.engine]),
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


def write_manifest(
    folder: str | Path, facts: Mapping[str, object], suffixes: Mapping[str, Sequence[str]] = SUFFIXES
) -> Bundle:
    """Make a bundle of a folder of graphs: hash its files and write ``bundle.json``.

    Args:
        folder: holds the graphs and the tokenizer, and no other files.
        facts: the fields of ``bundle.json`` but ``format`` and ``files``.
        suffixes: as in :func:`read`.

    Raises:
        UserError: as :func:`read`, which checks the result.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    files = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in paths}
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2, ensure_ascii=False)
    write(folder / MANIFEST, f"{text}\n".encode())
    return read(folder, suffixes)


def _shape(data: bytes, kind: type[T], where: str) -> T:
    try:
        return json_io.parse(data, kind, where)
    except UserError as error:
        raise UserError(f"{error}: fetch the model again") from None


def _check_files(bundle: Bundle) -> None:
    stems, others = NEEDED, ("tokenizer.json",)
    if bundle.t5_length:
        stems, others = (*stems, "t5"), (*others, T5_TOKENIZER)
    for name in (*(stem + end for stem in stems for end in bundle.suffixes), *others):
        bundle.path(name)
    for name, digest in bundle.files.items():
        if not _plain(name):  # a downloaded bundle must not reach files outside its folder
            raise UserError(f"{bundle.folder / MANIFEST} names a file outside its folder: {name[:80]!r}")
        path = bundle.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: fetch the model again")
        size = path.stat().st_size
        if size != digest.bytes:
            raise UserError(f"{path} has {size} bytes instead of {digest.bytes}: fetch the model again")


def _plain(name: str) -> bool:
    """Return whether a name is one file in a folder on every system."""
    windows = PureWindowsPath(name)
    apart = any(sign in name for sign in "/\\:") or name in ("", ".", "..") or windows.is_reserved()
    return name.isprintable() and not apart and len(name.encode()) <= MOST_NAME


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
