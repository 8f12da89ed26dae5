"""Fashion-MNIST (Xiao et al., arXiv 1708.07747) as shards: 60,000 images to train on and 10,000 to test.

Debian's package ``dataset-fashion-mnist`` has the original files, under the MIT licence.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.core.types import UserError
from fewstep.data import shards

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the files."""

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The classes in the order of the data set's labels. They are the captions of the shards."""

SIDE = 28
COUNTS = {"train": 60_000, "test": 10_000}
PER_SHARD = 10_000

_FILES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 0x803, 0x801  # IDX: bytes, of three and of one dimension

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LabelledImages:
    """Grey images, uint8 ``[N, 28, 28]``, and their classes, int64 ``[N]``."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def build(source: Path | None, folder: Path, progress: Progress) -> None:
    """Write the data set as shards into ``folder/train`` and ``folder/test``.

    Args:
        source: a folder with the four original files; ``None`` takes Debian's package, installed or
            downloaded.
        folder: of the shards.
        progress: called with the part, the shards done and their number.

    Raises:
        UserError: a file is missing or broken, or the package cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = source or (INSTALLED if INSTALLED.is_dir() else _fetch(Path(scratch)))
        for part, count in COUNTS.items():
            own = _read_original(place, part, count)
            number = count // PER_SHARD
            for shard in range(number):
                progress(part, shard, number)
                rows = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
                path = folder / part / f"{part}-{shard:02d}.tar"
                path.parent.mkdir(parents=True, exist_ok=True)
                shards.write_shard(path, _examples(own, rows))


def load(folder: Path, part: str) -> LabelledImages:
    """Read the shards of a part, ``train`` or ``test``.

    Raises:
        UserError: they are missing or broken, or hold other images.
    """
    place = folder / part
    if not place.is_dir():
        raise UserError(f"{folder} holds no Fashion-MNIST: fewstep data fashion --output {folder}")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for shard in shards.find(place):
        for example in shards.read(shard):
            if example.image.size != (SIDE, SIDE) or example.prompt not in CLASSES:
                raise UserError(f"{shard}: {example.key} is no image of Fashion-MNIST")
            images.append(np.asarray(example.image)[:, :, 0])
            labels.append(CLASSES.index(example.prompt))
    return LabelledImages(np.stack(images), np.array(labels))


def _examples(own: LabelledImages, rows: range) -> Iterator[tuple[str, Image.Image, str, dict[str, object]]]:
    for row in rows:
        label = int(own.labels[row])
        yield f"{row:05d}", Image.fromarray(own.images[row]), CLASSES[label], {"label": label}


def _fetch(scratch: Path) -> Path:
    """Download Debian's package, and return the folder with its files."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(
            "Fashion-MNIST is fetched with apt-get, which is not here: give a folder with its four files "
            "(train-images-idx3-ubyte.gz, …) with --source"
        )
    for command in (["apt-get", "download", PACKAGE], ["dpkg-deb", "-x", f"{PACKAGE}.deb", "."]):
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"{command[0]} could not fetch {PACKAGE} ({reason}): give the files with --source"
            )
        for found in scratch.glob(f"{PACKAGE}_*.deb"):
            found.rename(scratch / f"{PACKAGE}.deb")
    return scratch / INSTALLED.relative_to("/")


def _read_original(place: Path, part: str, count: int) -> LabelledImages:
    stem = _FILES[part]
    images = read_idx(place / f"{stem}-images-idx3-ubyte.gz", _IMAGES, (count, SIDE, SIDE))
    labels = read_idx(place / f"{stem}-labels-idx1-ubyte.gz", _LABELS, (count,)).astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise UserError(f"{place}: a label of {stem} is {labels.max()}, but there are {len(CLASSES)} classes")
    return LabelledImages(images, labels)


def read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of bytes.

    Raises:
        UserError: it is missing, broken, or of another shape.
    """
    header = 4 * (1 + len(shape))
    size = header + prod(shape)
    try:
        with gzip.open(path) as file:
            data = file.read(size + 1)
    except FileNotFoundError:
        raise UserError(f"{path.parent} lacks {path.name} of Fashion-MNIST") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    numbers = np.frombuffer(data[:header], ">u4") if len(data) >= header else np.zeros(0, ">u4")
    if len(data) != size or tuple(int(n) for n in numbers) != (magic, *shape):
        raise UserError(f"{path} is not the file of Fashion-MNIST of that name")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
