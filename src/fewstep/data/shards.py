"""WebDataset shards: written in parallel and resumably, read in order.

A shard is a tar of ``KEY.png`` (or any picture Pillow opens), ``KEY.txt`` (the caption) and, where the truth
is known, ``KEY.json``. Whatever was made elsewhere in that layout is read the same way.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep import formats
from fewstep.data.compose import Composer, Sample
from fewstep.files import replacing_file
from fewstep.files import write as write_file
from fewstep.picture import decode, flat
from fewstep.types import UserError
from fewstep.workers import pool

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Make = Callable[[int], Sample]


@dataclass(frozen=True)
class Example:
    """One (picture, caption) of a shard; ``truth`` is the ``.json`` beside it, or empty."""

    key: str
    image: Image.Image
    prompt: str
    truth: dict[str, Any]


def write(
    make: Composer,
    folder: Path,
    name: str,
    pictures: int,
    per_shard: int,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write ``pictures`` samples as ``NAME-00000.tar`` and so on; shards that are there already are kept.

    Shard contents depend on the composer and the index only, never on the number of workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, pictures, per_shard)
    paths = [folder / f"{name}-{k:05d}.tar" for k in range(len(starts))]
    todo = [
        (p, range(s, min(s + per_shard, pictures)))
        for p, s in zip(paths, starts, strict=True)
        if not p.exists()
    ]
    done = pictures - sum(len(indices) for _, indices in todo)
    progress(done, pictures)
    with pool(workers, _share, make) as executor:
        futures = [executor.submit(_write_one, path, indices) for path, indices in todo]
        for future in as_completed(futures):
            done += future.result()
            progress(done, pictures)
    return paths


_shared: list[Composer] = []  # each worker process is given the composer once, not with every shard


def _share(make: Composer) -> None:
    _shared[:] = [make]


def _write_one(path: Path, indices: range) -> int:
    write_shard(path, ((f"{i:08d}", s.image, s.prompt, s.truth()) for i in indices for s in (_shared[0](i),)))
    return len(indices)


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
    found = path.glob("*.tar") if path.is_dir() else path.parent.glob(path.name)
    paths = sorted(p for p in found if not p.name.startswith("."))  # what a killed writer left
    if not paths:
        raise UserError(
            f"{source}: no .tar shards there; write some with: fewstep data stickers (or: data folder)"
        )
    return paths


def read(shard: Path) -> Iterator[Example]:
    """The examples of one shard, in order.

    Raises:
        UserError: the shard is cut short or empty, a picture is broken, or a caption is missing.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    try:
        with shard.open("rb") as stream:
            for raw in group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}])):
                yield _example(raw, shard)
                count += 1
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{shard}: cut short or no tar of pictures and captions ({error}); write it again"
        ) from error
    if count == 0:
        raise UserError(f"{shard}: the shard is empty; write it again")


def _example(raw: dict[str, Any], shard: Path) -> Example:
    key = str(raw["__key__"])
    picture = next((raw[ending[1:]] for ending in PICTURES if ending[1:] in raw), None)
    if picture is None or "txt" not in raw:
        missing = "picture" if picture is None else "caption (.txt)"
        raise UserError(f"{shard}: {key} has no {missing}")
    truth: dict[str, Any] = formats.parse(raw["json"], where=f"{shard}: {key}.json") if "json" in raw else {}
    return Example(key, open_picture(picture, f"{shard}: {key}"), raw["txt"].decode().strip(), truth)


def open_picture(data: bytes, where: str) -> Image.Image:
    """Decode, laid on white, to RGB; a broken file is a :class:`UserError` that names it."""
    return flat(decode(data, where))


def square(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Centre-crop to a square and resize: uint8 ``[3, size, size]``."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    if side != size:
        cut = cut.resize((size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(cut, np.uint8).transpose(2, 0, 1))


def write_folder(
    source: Path,
    folder: Path,
    size: int,
    per_shard: int,
    progress: Callable[[int, int], None] = lambda d, t: None,
) -> list[Path]:
    """Shards of a folder of pictures, each with a caption of the same name in a ``.txt`` beside it.

    Raises:
        UserError: there is no picture, a caption is missing or empty, or a picture is broken.
    """
    pictures = sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES)
    if not pictures:
        raise UserError(f"{source}: no pictures ({', '.join(PICTURES)}) in that folder")
    keys = [_key(p, source) for p in pictures]
    if len(set(keys)) < len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise UserError(f"{source}: two pictures would both be named {twice}; rename one")
    _claim(folder, source.name, _told(pictures, size, per_shard))
    paths: list[Path] = []
    for number, start in enumerate(range(0, len(pictures), per_shard)):
        paths.append(folder / f"{source.name}-{number:05d}.tar")
        chosen = pictures[start : start + per_shard]
        if not paths[-1].exists():
            write_shard(paths[-1], map(partial(_captioned, source=source, size=size), chosen))
        progress(start + len(chosen), len(pictures))
    return paths


def _told(pictures: Sequence[Path], size: int, per_shard: int) -> str:
    """What tells these pictures and captions, as they are now, from others."""
    facts = [[size, per_shard]]
    for path in pictures:
        both = [path, path.with_suffix(".txt")]
        facts += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in both if p.exists()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _claim(folder: Path, name: str, told: str) -> None:
    """Keep shards of an interrupted run on the same pictures, remove those of other ones."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{name}.made-of"
    if not note.exists() or note.read_text() != told:
        for stale in folder.glob(f"{glob.escape(name)}-*.tar"):
            stale.unlink()
        write_file(note, told.encode())


def _key(path: Path, source: Path) -> str:
    return "_".join(path.relative_to(source).with_suffix("").parts).replace(".", "_")


def _captioned(path: Path, source: Path, size: int) -> tuple[str, Image.Image, str, dict[str, Any]]:
    caption = path.with_suffix(".txt")
    try:
        text = caption.read_text(encoding="utf-8").strip() if caption.exists() else ""
    except ValueError:
        raise UserError(f"{caption} is not UTF-8 text") from None
    if not text:
        raise UserError(f"{path}: its caption {caption.name} is missing or empty")
    pixels = square(open_picture(path.read_bytes(), str(path)), size)
    return _key(path, source), Image.fromarray(pixels.transpose(1, 2, 0)), text, {}


def pixels(shards: Sequence[Path], size: int) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]], str]]:
    """Every example of ``shards`` as (uint8 ``[3, size, size]``, caption)."""
    for shard in shards:
        for example in read(shard):
            yield square(example.image, size), example.prompt
