"""Render emoji to RGBA images, kept in one memory-mapped array."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
    """The images of all (concept, style) pairs.

    Attributes:
        concepts: the concepts.
        pairs: row -> (index of the concept, style).
        images: uint8 ``[N, size, size, 4]``, straight alpha.
    """

    concepts: list[Concept]
    pairs: list[tuple[int, str]]
    images: NDArray[np.uint8]

    @property
    def size(self) -> int:
        return int(self.images.shape[1])


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
    """Render all pairs into ``folder/renderings-SIZE.npy``, unless they are there, and open the file.

    Args:
        packages: Style -> folder of the unpacked package.
        concepts: The concepts to render.
        folder: Where the files go.
        size: Side of the images, pixels.
        workers: Number of processes.
        progress: Called with the number of images rendered and their total.
    """
    pairs = [(i, style) for style in STYLES for i, c in enumerate(concepts) if style in c.styles]
    index, store = folder / f"renderings-{size}.json", folder / f"renderings-{size}.npy"
    expected = {"concepts": [asdict(c) for c in concepts], "pairs": pairs, "size": size}
    if not (store.exists() and index.exists() and read_json(index) == json.loads(json.dumps(expected))):
        jobs = _jobs(packages, concepts, pairs, size)
        with replacing_file(store) as fresh, pool(workers) as executor:
            out = np.lib.format.open_memmap(fresh, "w+", np.uint8, (len(jobs), size, size, 4))
            for row, image in enumerate(executor.map(_render_one, jobs, chunksize=32)):
                out[row] = image
                progress(row + 1, len(jobs))
            out.flush()
        write(index, json.dumps(expected).encode())
    return _open(concepts, pairs, store, size)


def load(folder: Path, size: int) -> Renderings:
    """Open the files that :func:`render_all` wrote.

    Raises:
        UserError: The folder has no renderings of this size, or a file is damaged.
    """
    index, store = folder / f"renderings-{size}.json", folder / f"renderings-{size}.npy"
    if not (store.exists() and index.exists()):
        raise UserError(f"{folder} holds no renderings at {size} px; run: fewstep data stickers -o {folder}")
    contents: _Index = read_json(index, _Index)
    return _open(contents.concepts, contents.pairs, store, size)


def _open(concepts: list[Concept], pairs: list[tuple[int, str]], store: Path, size: int) -> Renderings:
    """Open the array ``store``.

    Raises:
        UserError: The array has another shape or type, or a pair is of an unknown concept or style.
    """
    advice = "delete it and run fewstep data stickers again"
    images = read_array(store)
    if images.shape != (len(pairs), size, size, 4) or images.dtype != np.uint8:
        raise UserError(f"{store} holds {images.dtype} {images.shape}, not its pairs' renderings; {advice}")
    if any(not 0 <= index < len(concepts) or style not in STYLES for index, style in pairs):
        raise UserError(f"{store.with_suffix('.json')} names pairs of unknown concepts; {advice}")
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
    """Return an icon as a complete SVG whose longer side is ``size`` pixels."""
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top, scale = icon.get("left", 0), icon.get("top", 0), size / max(width, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width * scale}" height="{height * scale}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )


def _render_one(job: tuple[str, bytes, int]) -> NDArray[np.uint8]:
    kind, data, size = job
    image = (
        _rasterise(data.decode())
        if kind == "svg"
        else decode(data, "a rendering of a package").convert("RGBA")
    )
    return np.asarray(_trim(image).resize((size, size), Image.Resampling.LANCZOS), np.uint8)


def _rasterise(svg: str) -> Image.Image:
    import resvg

    tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # x scale, x skew, x shift; y skew, y scale, y shift
    return decode(resvg.render(tree, identity), "resvg's PNG").convert("RGBA")


def _trim(image: Image.Image) -> Image.Image:
    """Crop to the visible pixels and centre them on a transparent square, so that styles agree in size."""
    box = image.getchannel("A").point([255 * (a > 8) for a in range(256)]).getbbox()
    if box is None:
        return image
    cropped = image.crop(box)
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square
