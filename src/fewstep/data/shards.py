"""WebDataset shards: written in parallel and resumably, read in order.

A shard is a tar of ``KEY.png`` (or another of :data:`PICTURES`), ``KEY.txt`` (the caption) and, where the
truth is known, ``KEY.json``. Whatever was made elsewhere in that layout is read the same way. Files whose
names begin with a dot are passed over, as in folders.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.core import json_io
from fewstep.core.atomic import replacing_file, shortened
from fewstep.core.atomic import write as write_file
from fewstep.core.prompt_text import decode_caption
from fewstep.core.types import UserError
from fewstep.data.folders import list_files, say_passed_over
from fewstep.images.decode import decode, to_rgb
from fewstep.images.io import MOST_BYTES
from fewstep.images.io import read as read_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
MOST_CAPTION = 2**20
"""Bytes of a caption's file."""
_NAME_BYTES = 230
"""Of a source's name in those of its shards, where a hash, a number and a suffix follow it."""


@dataclass(frozen=True)
class Example:
    """One (picture, caption) of a shard; ``truth`` is the ``.json`` beside it, or empty."""

    key: str
    image: Image.Image
    prompt: str
    truth: dict[str, Any]


def write_shard(path: Path, examples: Iterable[tuple[str, Image.Image, str, dict[str, Any]]]) -> None:
    """One tar, under a temporary name until it is whole. Time stamps are zero: same content, same bytes."""
    with replacing_file(path) as fresh, tarfile.open(fresh, "w") as tar:
        for key, image, prompt, truth in examples:
            picture = io.BytesIO()
            image.save(picture, "PNG")
            add(tar, f"{key}.png", picture.getvalue())
            add(tar, f"{key}.txt", prompt.encode())
            add(tar, f"{key}.json", json.dumps(truth).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes | memoryview) -> None:
    """Append a file with no time stamp and no owner."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def find(source: str | Path) -> list[Path]:
    """The shards of a folder, of a glob pattern, or the one file named.

    Raises:
        UserError: there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    try:
        found = [
            p for p in (path.glob("*.tar") if path.is_dir() else path.parent.glob(path.name)) if p.is_file()
        ]
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source}: cannot be searched for shards ({error})") from error
    say_passed_over([p for p in found if p.name.startswith(".")], "hidden shard", "hidden shards", source)
    paths = sorted(p for p in found if not p.name.startswith("."))
    if not paths:
        raise UserError(
            f"{source}: no .tar shards there; write some with: fewstep data stickers (or: data folder)"
        )
    return paths


def read(shard: Path) -> Iterator[Example]:
    """The examples of one shard, in order.

    Raises:
        UserError: the shard is cut short or empty, an image is broken, or a caption is missing.
    """
    count = 0
    for key, files in _grouped(shard):
        yield _example(key, files, shard)
        count += 1
    if count == 0:
        raise UserError(f"{shard}: the shard is empty; write it again")


def entries(shard: Path, endings: Sequence[str] = ()) -> Iterator[tuple[str, bytes]]:
    """The files of a shard by their names, in order, without folders and WebDataset's own ``__NAME__``.

    Files are passed over, with a line, whose name or folder begins with a dot.

    Args:
        shard: a tar, compressed or not.
        endings: of the names that are wanted, in lower case; empty for all.

    Raises:
        UserError: it is cut short or no tar, or a file in it is larger than an image may be.
    """
    hidden: list[str] = []
    try:
        with tarfile.open(shard, "r|*") as tar:
            for entry in tar:
                parts = entry.name.split("/")
                if not entry.isreg() or re.match(r"__[^/]*__($|/)", entry.name):
                    continue
                if any(part.startswith(".") and part not in (".", "..") for part in parts):
                    hidden.append(entry.name)
                elif entry.name.lower().endswith(tuple(endings) or ""):
                    if entry.size > MOST_BYTES:
                        raise UserError(f"{shard}: {entry.name} has more than {MOST_BYTES >> 20} MiB")
                    if (file := tar.extractfile(entry)) is not None:
                        yield entry.name, file.read()
                tar.members = []  # type: ignore[misc]  # else it keeps all that it has read of
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{shard}: cut short or no tar of pictures and captions ({error}); write it again"
        ) from error
    say_passed_over(hidden, "hidden file", "hidden files", shard)


def _grouped(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The files of each example by their endings. A key reaches to the first dot of a name, in WebDataset."""
    key, files = "", dict[str, bytes]()
    for name, data in entries(shard, (*PICTURES, ".txt", ".json")):
        folder, slash, base = name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not dot:
            continue
        if folder + slash + stem != key:
            if files:
                yield key, files
            key, files = folder + slash + stem, {}
        if ending.lower() in files:
            raise UserError(f"{shard}: {name} is there twice; write it again")
        files[ending.lower()] = data
    if files:
        yield key, files


def _example(key: str, files: dict[str, bytes], shard: Path) -> Example:
    picture = next((files[ending[1:]] for ending in PICTURES if ending[1:] in files), None)
    if picture is None or "txt" not in files:
        missing = "picture" if picture is None else "caption (.txt)"
        raise UserError(f"{shard}: {key} has no {missing}")
    truth: dict[str, Any] = {}
    if "json" in files:  # other people's may hold NaN
        truth = json_io.parse(files["json"], where=f"{shard}: {key}.json", python=True)
    caption = decode_caption(files["txt"], f"{shard}: {key}.txt")
    return Example(key, open_picture(picture, f"{shard}: {key}"), caption, truth)


def open_picture(data: bytes, where: str) -> Image.Image:
    """Decode, laid on white, to RGB; a broken file is a :class:`UserError` that names it."""
    image = decode(data, where)
    try:
        return to_rgb(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def square(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Centre-crop to a square and resize: uint8 ``[3, size, size]``."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    if side != size:
        cut = cut.resize((size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(cut, np.uint8).transpose(2, 0, 1))


@dataclass(frozen=True)
class _Pair:
    """An image of a folder, its caption's file, and the key that both get in a shard."""

    key: str
    image: Path
    caption: Path


@dataclass(frozen=True)
class _Made:
    """What a folder's shards were made of.

    Attributes:
        source: the folder, without links in its path.
        digest: tells its images and captions, and how they were written, from others.
        shards: how many there are: ``NAME-00000.tar`` and so on. Any more of that name are somebody else's.
    """

    source: str
    digest: str
    shards: int


def write_folder(
    source: Path,
    folder: Path,
    size: int,
    per_shard: int,
    progress: Callable[[int, int], None] = lambda d, t: None,
) -> list[Path]:
    """Shards of a folder of images, each with a caption of the same name in a ``.txt`` beside it.

    They are called ``SOURCE-00000.tar`` and so on by the source's name, without leading dots. Where somebody
    else has shards of that name in ``folder``, a short hash of the source's place is added.

    Raises:
        UserError: there is no image, a caption is missing or empty, an image is broken, or both names are
            somebody else's.
    """
    pairs = _pairs(source)
    made = _Made(os.path.realpath(source), _digest(pairs, size, per_shard), -(-len(pairs) // per_shard))
    name = _claim(folder, source, made)
    paths: list[Path] = []
    for number, start in enumerate(range(0, len(pairs), per_shard)):
        paths.append(folder / f"{name}-{number:05d}.tar")
        chosen = pairs[start : start + per_shard]
        if not paths[-1].exists():
            write_shard(paths[-1], map(partial(_captioned, size=size), chosen))
        progress(start + len(chosen), len(pairs))
    return paths


def _pairs(source: Path) -> list[_Pair]:
    """The images of a folder and its subfolders with their captions. What has no partner is told or refused.

    Raises:
        UserError: there is no image, one has no caption or two, or two would have one key.
    """
    listing = list_files(source)
    listing.say(source)
    captions: dict[Path, list[Path]] = {}
    for path in listing.files:
        if path.suffix.lower() == ".txt":
            captions.setdefault(path.with_suffix(""), []).append(path)
    pairs: dict[str, _Pair] = {}
    for path in listing.files:
        if path.suffix.lower() not in PICTURES:
            continue
        found, key = captions.get(path.with_suffix(""), []), _key(path, source)
        if len(found) != 1:
            many = "is missing or empty" if not found else f"could be {found[1].name} too"
            raise UserError(f"{path}: its caption {(found or [path.with_suffix('.txt')])[0].name} {many}")
        if key in pairs:
            raise UserError(f"{source}: two pictures would both be named {key}; rename one")
        pairs[key] = _Pair(key, path, found[0])
    if not pairs:
        raise UserError(f"{source}: no pictures ({', '.join(PICTURES)}) in that folder")
    used = {pair.caption for pair in pairs.values()}
    alone = [path for paths in captions.values() for path in paths if path not in used]
    say_passed_over(alone, "caption without a picture", "captions without a picture", source)
    return list(pairs.values())


def _digest(pairs: Sequence[_Pair], size: int, per_shard: int) -> str:
    """What tells these images and captions, as they are now, from others."""
    facts: list[list[Any]] = [[size, per_shard]]
    for path in (path for pair in pairs for path in (pair.image, pair.caption)):
        try:
            facts.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _claim(folder: Path, source: Path, made: _Made) -> str:
    """What the shards of ``source`` are called. Those that it has there are kept if made of the same.

    Only shards that a note says to be of this source are removed; any other of a name is somebody else's.

    Raises:
        UserError: both names that the shards can have are somebody else's, or one of more shards than before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = shortened(Path(os.path.abspath(source)).name.lstrip("."), _NAME_BYTES) or "images"
    place = hashlib.sha256(os.fsencode(made.source)).hexdigest()[:8]
    for name in (base, f"{base}-{place}"):
        note = folder / f"{name}.made-of"
        there = _read_note(note, made)
        if there is not None and there.source != made.source:
            print(f"fewstep: {name}-*.tar in {folder} are of {there.source}, and are kept", file=sys.stderr)
            continue
        ours, others = _shards_of(folder, name, there)
        if others and there is None:
            text = f"{others[0].name} in {folder} was made by something else, and is kept"
            print(f"fewstep: {text}", file=sys.stderr)
            continue
        if taken := [path for path in others if _number(path) < made.shards]:
            raise UserError(f"{taken[0]} was made by something else; move it, or choose another folder")
        if there != made:
            for stale in ours:
                stale.unlink()
            write_file(note, json.dumps(vars(made)).encode())
        return name
    raise UserError(f"{folder} holds shards named {base} that are not of {source}; choose another folder")


def _shards_of(folder: Path, name: str, made: _Made | None) -> tuple[list[Path], list[Path]]:
    """The shards called ``name`` that a note tells of, and all others of that name."""
    known = {f"{name}-{number:05d}.tar" for number in range(made.shards if made else 0)}
    found = [p for p in folder.iterdir() if re.fullmatch(rf"{re.escape(name)}-\d{{5,}}\.tar", p.name)]
    found.sort()
    return [p for p in found if p.name in known], [p for p in found if p.name not in known]


def _number(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])


def _read_note(note: Path, made: _Made) -> _Made | None:
    """What a note says, or ``None`` where there is none."""
    if not note.exists():
        return None
    if note.read_bytes() == made.digest.encode():  # fewstep 0.1.0 wrote the digest alone
        return made
    try:
        return json_io.read(note, _Made)
    except UserError as error:
        raise UserError(f"{error}; remove it and the shards beside it, or choose another folder") from None


def _key(path: Path, source: Path) -> str:
    return "_".join(path.relative_to(source).with_suffix("").parts).replace(".", "_")


def _captioned(pair: _Pair, size: int) -> tuple[str, Image.Image, str, dict[str, Any]]:
    text = decode_caption(json_io.read_bytes(pair.caption, MOST_CAPTION), str(pair.caption))
    if not text:
        raise UserError(f"{pair.image}: its caption {pair.caption.name} is missing or empty")
    if pair.image.exists() and not pair.image.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{pair.image} is no file")
    pixels = square(open_picture(read_image(pair.image), str(pair.image)), size)
    return pair.key, Image.fromarray(pixels.transpose(1, 2, 0)), text, {}


def pixels(shards: Sequence[Path], size: int) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]], str]]:
    """Every example of ``shards`` as (uint8 ``[3, size, size]``, caption)."""
    for shard in shards:
        for example in read(shard):
            yield square(example.image, size), example.prompt


def training_shards(data: Path) -> list[Path]:
    """The shards to learn from: those in ``data/train``, or in ``data`` itself where there is no such folder.

    Raises:
        UserError: there are none.
    """
    from fewstep.data import shards

    return shards.find(data / "train" if (data / "train").is_dir() else data)
