"""WebDataset shards: written atomically, read in order.

A shard is a tar of ``KEY.png`` (or another of :data:`IMAGE_SUFFIXES`), ``KEY.txt`` (the caption) and,
optionally, ``KEY.json``. Shards that other programs wrote in this layout are read, too. Files whose names
begin with a dot are skipped, as in folders.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.core import json_io
from fewstep.core.atomic import replacing_file
from fewstep.core.prompt_text import decode_caption
from fewstep.core.types import UserError
from fewstep.data.folders import say_skipped
from fewstep.images.decode import decode, to_rgb
from fewstep.images.io import MOST_BYTES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")


@dataclass(frozen=True)
class Example:
    """One image of a shard with its caption.

    Attributes:
        key: name of its files, without suffixes.
        image: RGB, laid on white.
        prompt: the caption.
        truth: contents of the ``.json`` beside it, or empty.
    """

    key: str
    image: Image.Image
    prompt: str
    truth: dict[str, Any]


def write_shard(path: Path, examples: Iterable[tuple[str, Image.Image, str, Mapping[str, object]]]) -> None:
    """Write a shard of (key, image, caption, content of the ``.json``), atomically.

    Time stamps are zero, so the same content gives the same bytes.
    """
    with replacing_file(path) as fresh, tarfile.open(fresh, "w") as tar:
        for key, image, prompt, truth in examples:
            png = io.BytesIO()
            image.save(png, "PNG")
            add_file(tar, f"{key}.png", png.getvalue())
            add_file(tar, f"{key}.txt", prompt.encode())
            add_file(tar, f"{key}.json", json.dumps(truth).encode())


def add_file(tar: tarfile.TarFile, name: str, data: bytes | memoryview) -> None:
    """Append a file with no time stamp and no owner."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def find(source: str | Path) -> list[Path]:
    """Return the shards of a folder or of a glob pattern, or the file itself.

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
    say_skipped([p for p in found if p.name.startswith(".")], "hidden shard", "hidden shards", source)
    paths = sorted(p for p in found if not p.name.startswith("."))
    if not paths:
        raise UserError(
            f"{source}: no .tar shards there; write some with: fewstep data stickers (or: data folder)"
        )
    return paths


def read(shard: Path) -> Iterator[Example]:
    """Yield the examples of one shard, in order.

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
    """Yield name and content of a shard's files, in order, without folders and WebDataset's ``__NAME__``.

    Files whose name or folder begins with a dot are skipped, and a line says so.

    Args:
        shard: a tar, compressed or not.
        endings: of the names to yield, in lower case; empty for all.

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
            f"{shard}: cut short or no tar of images and captions ({error}); write it again"
        ) from error
    say_skipped(hidden, "hidden file", "hidden files", shard)


def _grouped(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and files by suffix of each example. In WebDataset, a key ends at the first dot of a name."""
    key, files = "", dict[str, bytes]()
    for name, data in entries(shard, (*IMAGE_SUFFIXES, ".txt", ".json")):
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
    data = next((files[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in files), None)
    if data is None or "txt" not in files:
        missing = "image" if data is None else "caption (.txt)"
        raise UserError(f"{shard}: {key} has no {missing}")
    truth: dict[str, Any] = {}
    if "json" in files:  # of other programs it may hold NaN
        truth = json_io.parse(files["json"], where=f"{shard}: {key}.json", python=True)
    caption = decode_caption(files["txt"], f"{shard}: {key}.txt")
    return Example(key, open_image(data, f"{shard}: {key}"), caption, truth)


def open_image(data: bytes, where: str) -> Image.Image:
    """Decode an image to RGB, laid on white.

    Raises:
        UserError: it is broken; the message names ``where``.
    """
    image = decode(data, where)
    try:
        return to_rgb(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def center_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return the central square of an image, resized: uint8 ``[3, size, size]``."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    if side != size:
        cut = cut.resize((size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(cut, np.uint8).transpose(2, 0, 1))


def pixels(shards: Sequence[Path], size: int) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Yield every example of ``shards`` as (uint8 ``[3, size, size]``, caption)."""
    for shard in shards:
        for example in read(shard):
            yield center_crop(example.image, size), example.prompt


def training_shards(data: Path) -> list[Path]:
    """Return the shards to train on: those in ``data/train``, or in ``data`` if there is no such folder.

    Raises:
        UserError: there are none.
    """
    return find(data / "train" if (data / "train").is_dir() else data)
