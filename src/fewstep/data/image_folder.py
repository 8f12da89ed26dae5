"""Write a folder of images and captions as shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from fewstep.core import json_io
from fewstep.core.atomic import shortened
from fewstep.core.atomic import write as write_file
from fewstep.core.progress import say
from fewstep.core.prompt_text import decode_caption
from fewstep.core.types import UserError
from fewstep.data.folders import list_files, say_skipped
from fewstep.data.shards import IMAGE_SUFFIXES, center_crop, open_image, write_shard
from fewstep.images.io import read as read_image

MAX_CAPTION_BYTES = 2**20
_NAME_BYTES = 230
"""Longest name of a source in the names of its shards; a hash, a number and a suffix follow it."""


@dataclass(frozen=True)
class _Pair:
    """An image of a folder, its caption's file, and the key of both in a shard."""

    key: str
    image: Path
    caption: Path


@dataclass(frozen=True)
class _Origin:
    """The content of the file ``NAME.made-of`` beside shards: what they were made of.

    Attributes:
        source: the folder, without links in its path.
        digest: hash of its images and captions, and of how they were written.
        shards: how many there are, ``NAME-00000.tar`` and so on. Further shards of that name are not ours.
    """

    source: str
    digest: str
    shards: int


def write_folder(
    source: Path,
    folder: Path,
    size: int,
    per_shard: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a folder of images as shards; each image has a caption of the same name in a ``.txt`` beside it.

    Shards are called ``SOURCE-00000.tar`` and so on, by the source's name without leading dots. If ``folder``
    holds shards of that name from another source, a short hash of the source's path is added.

    Args:
        source: the images and captions; subfolders are read, too.
        folder: where the shards are written.
        size: side of the images in the shards, pixels.
        per_shard: images per shard; the last one may have fewer.
        progress: called with the number of images that are done, and of all.

    Raises:
        UserError: there is no image, a caption is missing or empty, an image is broken, or both names are
            taken by other shards.
    """
    pairs = _pairs(source)
    origin = _Origin(os.path.realpath(source), _digest(pairs, size, per_shard), -(-len(pairs) // per_shard))
    name = _claim(folder, source, origin)
    paths: list[Path] = []
    for number, start in enumerate(range(0, len(pairs), per_shard)):
        paths.append(folder / f"{name}-{number:05d}.tar")
        part = pairs[start : start + per_shard]
        if not paths[-1].exists():
            write_shard(paths[-1], map(partial(_example, size=size), part))
        progress(start + len(part), len(pairs))
    return paths


def _pairs(source: Path) -> list[_Pair]:
    """Return the images of a folder and its subfolders with their captions; a lone caption is skipped.

    Raises:
        UserError: there is no image, one has no caption or two, or two would have one key.
    """
    listing = list_files(source)
    listing.say_skipped(source)
    captions: dict[Path, list[Path]] = {}
    for path in listing.files:
        if path.suffix.lower() == ".txt":
            captions.setdefault(path.with_suffix(""), []).append(path)
    pairs: dict[str, _Pair] = {}
    for path in listing.files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        found, key = captions.get(path.with_suffix(""), []), _key(path, source)
        if len(found) != 1:
            problem = "is missing or empty" if not found else f"could be {found[1].name} too"
            raise UserError(f"{path}: its caption {(found or [path.with_suffix('.txt')])[0].name} {problem}")
        if key in pairs:
            raise UserError(f"{source}: two images would both be named {key}; rename one")
        pairs[key] = _Pair(key, path, found[0])
    if not pairs:
        raise UserError(f"{source}: no images ({', '.join(IMAGE_SUFFIXES)}) in that folder")
    used = {pair.caption for pair in pairs.values()}
    alone = [path for paths in captions.values() for path in paths if path not in used]
    say_skipped(alone, "caption without an image", "captions without an image", source)
    return list(pairs.values())


def _digest(pairs: Sequence[_Pair], size: int, per_shard: int) -> str:
    """Return a hash of these images and captions as they are now, and of how they are written."""
    facts: list[list[object]] = [[size, per_shard]]
    for path in (path for pair in pairs for path in (pair.image, pair.caption)):
        try:
            facts.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _claim(folder: Path, source: Path, origin: _Origin) -> str:
    """Return the name of the shards of ``source``; earlier ones are kept if they were made of the same.

    Only shards that a ``.made-of`` file says to be of this source are removed. All others are kept.

    Raises:
        UserError: both names are taken by other shards, or a new shard would replace one that is not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = shortened(Path(os.path.abspath(source)).name.lstrip("."), _NAME_BYTES) or "images"
    path_hash = hashlib.sha256(os.fsencode(origin.source)).hexdigest()[:8]
    for name in (base, f"{base}-{path_hash}"):
        note = folder / f"{name}.made-of"
        there = _read_origin(note, origin)
        if there is not None and there.source != origin.source:
            say(f"{name}-*.tar in {folder} are of {there.source}, and are kept")
            continue
        ours, others = _shards_of(folder, name, there)
        if others and there is None:
            say(f"{others[0].name} in {folder} was made by something else, and is kept")
            continue
        if taken := [path for path in others if _number(path) < origin.shards]:
            raise UserError(f"{taken[0]} was made by something else; move it, or choose another folder")
        if there != origin:
            for stale in ours:
                stale.unlink()
            write_file(note, json.dumps(vars(origin)).encode())
        return name
    raise UserError(f"{folder} holds shards named {base} that are not of {source}; choose another folder")


def _shards_of(folder: Path, name: str, origin: _Origin | None) -> tuple[list[Path], list[Path]]:
    """Return the shards called ``name`` that belong to ``origin``, and all others of that name."""
    known = {f"{name}-{number:05d}.tar" for number in range(origin.shards if origin else 0)}
    found = [p for p in folder.iterdir() if re.fullmatch(rf"{re.escape(name)}-\d{{5,}}\.tar", p.name)]
    found.sort()
    return [p for p in found if p.name in known], [p for p in found if p.name not in known]


def _number(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])


def _read_origin(note: Path, origin: _Origin) -> _Origin | None:
    """Read a ``.made-of`` file, or return ``None`` if there is none."""
    if not note.exists():
        return None
    if note.read_bytes() == origin.digest.encode():  # fewstep 0.1.0 wrote the digest alone
        return origin
    try:
        return json_io.read(note, _Origin)
    except UserError as error:
        raise UserError(f"{error}; remove it and the shards beside it, or choose another folder") from None


def _key(path: Path, source: Path) -> str:
    return "_".join(path.relative_to(source).with_suffix("").parts).replace(".", "_")


def _example(pair: _Pair, size: int) -> tuple[str, Image.Image, str, dict[str, object]]:
    text = decode_caption(json_io.read_bytes(pair.caption, MAX_CAPTION_BYTES), str(pair.caption))
    if not text:
        raise UserError(f"{pair.image}: its caption {pair.caption.name} is missing or empty")
    if pair.image.exists() and not pair.image.is_file():  # opening a pipe would block
        raise UserError(f"{pair.image} is no file")
    pixels = center_crop(open_image(read_image(pair.image), str(pair.image)), size)
    return pair.key, Image.fromarray(pixels.transpose(1, 2, 0)), text, {}
