"""Build the stickers data set, and the reference images of its evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core.atomic import write
from fewstep.core.types import UserError
from fewstep.pocket import captions, compose, concepts, render, sources, write_shards
from fewstep.pocket.captions import Background
from fewstep.pocket.compose import Composer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """A rendering centred on plain white, with its plain prompt; ``image`` is uint8 ``[3, size, size]``."""

    concept: str
    style: str
    held_out: bool
    image: NDArray[np.uint8]
    prompt: str


def build(
    folder: Path, *, size: int, num_images: int, scenes: float, seed: int, workers: int, progress: Progress
) -> None:
    """Fetch, render and compose the data set into ``folder``. An interrupted build continues.

    Args:
        folder: Where the data set goes.
        size: Side of the images, pixels.
        num_images: Training images; a twentieth as many, at least 256, are held out.
        scenes: Share of images with more than one object.
        seed: Seed of the training images; the held-out images use the next one.
        workers: Number of processes.
        progress: Called with a stage, the items done and their total.

    Raises:
        UserError: The folder holds a data set of other options, or a package cannot be fetched.
    """
    options = {
        "size": size,
        "pictures": num_images,
        "scenes": scenes,
        "seed": seed,
        "composer": compose.VERSION,
        "packages": {p.name: p.version for p in sources.PACKAGES.values()},
    }
    _check_options(folder, options)
    packages = sources.fetch(folder / "packages", lambda line: progress(line, 0, 0))
    write(folder / "LICENCES.md", sources.licence_table().encode())
    all_concepts = concepts.load(packages)
    rendered = render.render_all(
        packages, all_concepts, folder, size, workers, lambda d, t: progress("rasterising emoji", d, t)
    )
    train = Composer(rendered, size, seed, scenes)
    write_shards.write(
        train,
        folder / "train",
        "train",
        num_images,
        1000,
        workers,
        lambda d, t: progress("writing training shards", d, t),
    )
    heldout = Composer(rendered, size, seed + 1, scenes, training=False)
    num_heldout = max(256, num_images // 20)
    write_shards.write(
        heldout,
        folder / "heldout",
        "heldout",
        num_heldout,
        1000,
        workers,
        lambda d, t: progress("writing held-out shards", d, t),
    )


def _check_options(folder: Path, options: Mapping[str, object]) -> None:
    """Check that ``folder`` holds no data set of other options and no other files of these names."""
    for index in ("bundle.json", "model_index.json", "run.json"):
        if (folder / index).is_file():
            raise UserError(f"{folder} holds a model or a run ({index}): choose another folder with -o")
    folder.mkdir(parents=True, exist_ok=True)
    options_file = folder / "stickers.json"
    names = ("LICENCES.md", "renderings-*", "train/train-*.tar", "heldout/heldout-*.tar")
    existing = [path for name in names for path in folder.glob(name)]
    if existing and not options_file.exists():
        raise UserError(
            f"{existing[0]} was not made by fewstep data stickers (there is no {options_file.name}); "
            "choose another folder with -o"
        )
    if options_file.exists() and (saved := sources.read_json(options_file, dict[str, Any])) != options:
        changed = ", ".join(k for k in options if saved.get(k) != options[k])
        raise UserError(f"{folder} holds stickers made with another {changed}; choose another folder with -o")
    write(options_file, json.dumps(options, indent=1).encode())


def references(folder: Path, size: int = 128) -> list[Reference]:
    """Return all renderings on plain white, with the plain prompt of each pair.

    Raises:
        UserError: The folder has no renderings of this size.
    """
    rendered = render.load(folder, size)
    composer = Composer(rendered, size)
    result: list[Reference] = []
    for row, (index, style) in enumerate(rendered.pairs):
        concept = rendered.concepts[index]
        rng = np.random.Generator(np.random.Philox(key=[7, row]))
        image = np.asarray(composer.sticker(row, rng, Background()).image).transpose(2, 0, 1)
        is_held_out = concepts.held_out(concept.name, style)
        result.append(
            Reference(concept.name, style, is_held_out, image, captions.plain_prompt(concept, style))
        )
    return result
