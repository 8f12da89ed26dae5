"""The stickers data set, whole: fetch, rasterise, compose, write; and evaluation's references."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.atomic import write
from fewstep.core.types import UserError
from fewstep.pocket import captions, compose, concepts, render, sources, write_shards
from fewstep.pocket.captions import Background
from fewstep.pocket.compose import Composer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """One rendering, plain and centred, with its prompt; ``image`` uint8 ``[3, size, size]``."""

    concept: str
    style: str
    held_out: bool
    image: np.ndarray[Any, np.dtype[np.uint8]]
    prompt: str


def build(
    folder: Path, *, size: int, pictures: int, scenes: float, seed: int, workers: int, progress: Progress
) -> None:
    """Make the data set in ``folder``; what an interrupted run left is kept and gone on from.

    Raises:
        UserError: the folder holds a data set of other options, or a package cannot be fetched.
    """
    options = {
        "size": size,
        "pictures": pictures,
        "scenes": scenes,
        "seed": seed,
        "composer": compose.VERSION,
        "packages": {p.name: p.version for p in sources.PACKAGES.values()},
    }
    _claim(folder, options)
    packages = sources.fetch(folder / "packages", lambda line: progress(line, 0, 0))
    write(folder / "LICENCES.md", sources.licence_table().encode())
    found = concepts.load(packages)
    rendered = render.render_all(
        packages, found, folder, size, workers, lambda d, t: progress("rasterising emoji", d, t)
    )
    train = Composer(rendered, size, seed, scenes)
    write_shards.write(
        train,
        folder / "train",
        "train",
        pictures,
        1000,
        workers,
        lambda d, t: progress("writing training shards", d, t),
    )
    held = Composer(rendered, size, seed + 1, scenes, training=False)
    many = max(256, pictures // 20)
    write_shards.write(
        held,
        folder / "heldout",
        "heldout",
        many,
        1000,
        workers,
        lambda d, t: progress("writing held-out shards", d, t),
    )


def _claim(folder: Path, options: dict[str, Any]) -> None:
    """Refuse to mix two data sets in one folder, or ours with what somebody else has there."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "stickers.json"
    names = ("LICENCES.md", "renderings-*", "train/train-*.tar", "heldout/heldout-*.tar")
    others = [path for name in names for path in folder.glob(name)]
    if others and not note.exists():
        raise UserError(
            f"{others[0]} was not made by fewstep data stickers (there is no {note.name}); "
            "choose another folder with -o"
        )
    if note.exists() and (there := sources.read_json(note, dict[str, Any])) != options:
        changed = ", ".join(k for k in options if there.get(k) != options[k])
        raise UserError(f"{folder} holds stickers made with another {changed}; choose another folder with -o")
    write(note, json.dumps(options, indent=1).encode())


def references(folder: Path, size: int = 128) -> list[Reference]:
    """All renderings on plain white, as the canonical prompt of each pair asks for them.

    Raises:
        UserError: nothing was rendered there at this size.
    """
    rendered = render.load(folder, size)
    composer = Composer(rendered, size)
    out: list[Reference] = []
    for row, (index, style) in enumerate(rendered.pairs):
        concept = rendered.concepts[index]
        rng = np.random.Generator(np.random.Philox(key=[7, row]))
        picture = np.asarray(composer.sticker(row, rng, Background()).image).transpose(2, 0, 1)
        held = concepts.held_out(concept.name, style)
        out.append(Reference(concept.name, style, held, picture, captions.plain(concept, style)))
    return out
