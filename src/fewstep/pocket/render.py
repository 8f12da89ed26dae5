"""Emoji to RGBA pictures, once, into one memory-mapped array."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.core.atomic import replacing_file, write
from fewstep.core.json_io import read_array
from fewstep.core.types import UserError
from fewstep.core.workers import pool
from fewstep.images.decode import decode
from fewstep.pocket.concepts import Concept, icon_names
from fewstep.pocket.sources import STYLES, read_json


@dataclass(frozen=True)
class Renderings:
    """Every (concept, style) pair as a picture.

    Attributes:
        concepts: what they show.
        pairs: row -> (index of the concept, style).
        pictures: uint8 ``[N, size, size, 4]``, straight alpha.
    """

    concepts: list[Concept]
    pairs: list[tuple[int, str]]
    pictures: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def size(self) -> int:
        return int(self.pictures.shape[1])


@dataclass(frozen=True)
class _Index:
    """The shape of ``renderings-SIZE.json``."""

    concepts: list[Concept]
    pairs: list[tuple[int, str]]


def render_all(
    packages: dict[str, Path],
    concepts: list[Concept],
    folder: Path,
    size: int,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Renderings:
    """Rasterise all pairs into ``folder/renderings-SIZE.npy`` (kept when it is there) and open it."""
    pairs = [(i, style) for style in STYLES for i, c in enumerate(concepts) if style in c.styles]
    index, store = folder / f"renderings-{size}.json", folder / f"renderings-{size}.npy"
    wanted = {"concepts": [asdict(c) for c in concepts], "pairs": pairs, "size": size}
    if not (store.exists() and index.exists() and read_json(index) == json.loads(json.dumps(wanted))):
        jobs = _jobs(packages, concepts, pairs, size)
        with replacing_file(store) as fresh, pool(workers) as executor:
            out = np.lib.format.open_memmap(fresh, "w+", np.uint8, (len(jobs), size, size, 4))
            for row, picture in enumerate(executor.map(_draw, jobs, chunksize=32)):
                out[row] = picture
                progress(row + 1, len(jobs))
            out.flush()
        write(index, json.dumps(wanted).encode())
    return _opened(concepts, pairs, store, size)


def load(folder: Path, size: int) -> Renderings:
    """Open what :func:`render_all` wrote.

    Raises:
        UserError: nothing was rendered there at this size, or a file is damaged.
    """
    index, store = folder / f"renderings-{size}.json", folder / f"renderings-{size}.npy"
    if not (store.exists() and index.exists()):
        raise UserError(f"{folder} holds no renderings at {size} px; run: fewstep data stickers -o {folder}")
    read: _Index = read_json(index, _Index)
    return _opened(read.concepts, read.pairs, store, size)


def _opened(concepts: list[Concept], pairs: list[tuple[int, str]], store: Path, size: int) -> Renderings:
    """The renderings in ``store``.

    Raises:
        UserError: it holds other arrays, or pairs of what is no concept.
    """
    again = "delete it and run fewstep data stickers again"
    images = read_array(store)
    if images.shape != (len(pairs), size, size, 4) or images.dtype != np.uint8:
        raise UserError(f"{store} holds {images.dtype} {images.shape}, not its pairs' renderings; {again}")
    if any(not 0 <= place < len(concepts) or style not in STYLES for place, style in pairs):
        raise UserError(f"{store.with_suffix('.json')} names pairs of unknown concepts; {again}")
    return Renderings(concepts, pairs, images)


def _jobs(
    packages: dict[str, Path], concepts: list[Concept], pairs: list[tuple[int, str]], size: int
) -> list[tuple[str, bytes, int]]:
    names = {style: icon_names(packages[style], style) for style in STYLES}
    sets = {style: read_json(packages[style] / "icons.json") for style in STYLES if style != "3d"}
    jobs: list[tuple[str, bytes, int]] = []
    for i, style in pairs:
        name = names[style][concepts[i].code]
        if style == "3d":
            jobs.append(("webp", (packages[style] / "assets" / name).read_bytes(), size))
        else:
            # Drawn at twice the size, so that trimming and shrinking lose no sharpness.
            jobs.append(("svg", _svg(sets[style], name, 2 * size).encode(), size))
    return jobs


def _svg(icons: dict[str, Any], name: str, size: int) -> str:
    """A complete drawing, its longer side ``size`` pixels."""
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top, scale = icon.get("left", 0), icon.get("top", 0), size / max(width, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width * scale}" height="{height * scale}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )


def _draw(job: tuple[str, bytes, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    kind, data, size = job
    picture = (
        _rasterise(data.decode())
        if kind == "svg"
        else decode(data, "a rendering of a package").convert("RGBA")
    )
    return np.asarray(_trim(picture).resize((size, size), Image.Resampling.LANCZOS), np.uint8)


def _rasterise(svg: str) -> Image.Image:
    import resvg

    tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # x scale, x skew, x shift; y skew, y scale, y shift
    return decode(resvg.render(tree, identity), "resvg's PNG").convert("RGBA")


def _trim(picture: Image.Image) -> Image.Image:
    """Crop to what is visible and centre it on a transparent square, so that styles agree on size."""
    box = picture.getchannel("A").point([255 * (a > 8) for a in range(256)]).getbbox()
    if box is None:
        return picture
    cut = picture.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square
