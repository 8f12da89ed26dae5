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
is 1: as the engine wants them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fewstep.files import write
from fewstep.types import Sampler, UserError

FORMAT = 2
"""Of 1, the modulations were in the transformer's graph."""
MANIFEST = "bundle.json"
CARD = "README.md"
"""The model card's name, in a bundle as on the hub."""
LARGEST = 4096
"""Of the counts in a description: sides of latents, steps, tokens."""
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


@dataclass(frozen=True)
class Stamp:
    """What a file of a bundle must be: its length in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


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
    files: Mapping[str, Stamp]
    digest: str

    @property
    def styles(self) -> tuple[str, ...]:
        """The style words that the model knows."""
        return tuple(str(style) for style in self.about.get("styles", ()))

    @property
    def size(self) -> int:
        """Bytes of all files that the description lists."""
        return sum(stamp.bytes for stamp in self.files.values())

    def told(self) -> dict[str, Any]:
        """What its ``bundle.json`` tells, but ``format`` and ``files``: what :func:`seal` takes."""
        facts: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
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
            UserError: the bundle does not list it.
        """
        return self.path(stem + SUFFIXES[self.engine][0])

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
        UserError: no bundle, an unknown format, an incomplete description, a missing or cut file.
    """
    folder = Path(folder)
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        raise UserError(f"{folder} is not a model bundle: it has no readable {MANIFEST}") from None
    try:
        facts: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{folder / MANIFEST} is damaged (not JSON): fetch the model again") from None
    if not isinstance(facts, dict) or "format" not in facts:
        raise UserError(f"{folder / MANIFEST} is damaged (it names no format): fetch the model again")
    if (found := facts["format"]) != FORMAT:
        older = isinstance(found, int) and found < FORMAT
        hint = "export or fetch it again" if older else "upgrade fewstep"
        raise UserError(f"{folder} has bundle format {found}, this fewstep reads {FORMAT}: {hint}")
    try:
        bundle = _parse(folder, facts, hashlib.sha256(data).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / MANIFEST} is incomplete or damaged (at {error})") from None
    _check_files(bundle)
    return bundle


def seal(folder: str | Path, facts: Mapping[str, Any]) -> Bundle:
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


def _parse(folder: Path, facts: dict[str, Any], digest: str) -> Bundle:
    latent, guidance = facts["latent"], facts["guidance"]
    channels, height, width = (latent[name] for name in ("channels", "height", "width"))
    downscale, steps, length = latent["downscale"], facts["steps"], facts["text"]["length"]
    t5_length = facts["text"].get("t5", 0)
    counts = (channels, height, width, downscale, steps, length, t5_length + 1)
    if not all(type(count) is int and 0 < count <= LARGEST for count in counts):
        raise ValueError("latent, steps or text")
    about = dict(facts.get("about", {}))
    if not isinstance(about.get("styles", []), list):
        raise TypeError("about.styles")
    sampler, engine = facts.get("sampler", "euler"), facts.get("engine", "onnx")
    if sampler not in get_args(Sampler):
        raise ValueError("sampler")
    compute = facts.get("compute", "float32")
    if compute not in get_args(Compute):
        raise ValueError("compute")
    if engine not in SUFFIXES:
        raise UserError(f"{folder} is for {str(engine)[:40]!r}, which this fewstep does not know: upgrade it")
    return Bundle(
        folder=folder,
        name=str(facts["name"]),
        family=str(facts["family"]),
        engine=engine,
        compute=compute,
        license=str(facts["license"]),
        latent=(channels, height, width),
        downscale=downscale,
        shift=float(facts["shift"]),
        steps=steps,
        guidance=None if guidance is None else float(guidance),
        sampler=sampler,
        length=length,
        t5_length=t5_length,
        about=about,
        files={name: Stamp(int(at["bytes"]), str(at["sha256"])) for name, at in facts["files"].items()},
        digest=digest,
    )


def _check_files(bundle: Bundle) -> None:
    stems, others = NEEDED, ("tokenizer.json",)
    if bundle.t5_length:
        stems, others = (*stems, "t5"), (*others, T5_TOKENIZER)
    for name in (*(stem + end for stem in stems for end in SUFFIXES[bundle.engine]), *others):
        bundle.path(name)
    for name, stamp in bundle.files.items():
        if Path(name).name != name:  # a bundle from elsewhere must not reach out of its folder
            raise UserError(f"{bundle.folder / MANIFEST} names a file outside its folder: {name!r}")
        path = bundle.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: fetch the model again")
        size = path.stat().st_size
        if size != stamp.bytes:
            raise UserError(f"{path} has {size} bytes instead of {stamp.bytes}: fetch the model again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
