"""The commands ``data stickers``, ``data fashion`` and ``data folder``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from cyclopts import App

from fewstep.cli.options import Output
from fewstep.core.atomic import held
from fewstep.core.optional import need
from fewstep.core.progress import Progress, emit
from fewstep.core.types import UserError

app = App(name="data")


@app.command
def stickers(
    *,
    output: Output = Path("data/stickers"),
    size: int = 128,
    images: int = 40_000,
    scenes: float = 0.2,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Download openly licensed emoji, and write captioned stickers and scenes as shards.

    Args:
        output: Folder of the data set. An interrupted run resumes.
        size: Side of the images in pixels: 64, 128 or 256.
        images: Number of training images.
        scenes: Share of images with several objects, 0 to 1.
        seed: Seed of the data set.
        workers: Processes. 0 takes one per core.
    """
    from fewstep.pocket.sources import check_npm
    from fewstep.pocket.stickers import build

    if size not in (64, 128, 256) or images < 1 or not 0 <= scenes <= 1:
        raise UserError("--size must be 64, 128 or 256, --images at least 1, --scenes between 0 and 1")
    if workers < 0 or not 0 <= seed < 2**63:
        raise UserError(f"--workers must be at least 0, and --seed lie between 0 and {2**63 - 1}")
    need("resvg")
    check_npm(output / "packages")
    with held(output, "filled"), Progress() as progress:
        build(
            output,
            size=size,
            num_images=images,
            scenes=scenes,
            seed=seed,
            workers=workers or os.cpu_count() or 1,
            progress=progress,
        )
    emit(str(output))


@app.command
def fashion(*, output: Output = Path("data/fashion"), source: Path | None = None) -> None:
    """Write Fashion-MNIST as shards: 60,000 images to train on and 10,000 to test.

    Args:
        output: Folder of the data set.
        source: Folder with the four original files. [default: Debian's package dataset-fashion-mnist,
            which is downloaded if it is not installed]
    """
    from fewstep.fashion.data import build

    if source is not None and not source.is_dir():
        raise UserError(f"{source}: no such folder")
    with held(output, "filled"), Progress() as progress:
        build(source, output, progress)
    emit(str(output))


@app.command
def folder(source: Path, *, output: Output, size: int = 128) -> None:
    """Write a folder of images, each with its caption in a .txt file, as shards.

    Args:
        source: The folder. Subfolders are searched, too.
        output: Folder for the shards.
        size: Side in pixels of the square to which each image is cropped and resized.
    """
    from fewstep.data.image_folder import write_folder

    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not 8 <= size <= 4096:
        raise UserError(f"--size must lie between 8 and 4096, not {size}")
    with held(output, "filled"), Progress() as progress:
        progress("writing shards")
        write_folder(source, output, size, 1000, partial(progress, "writing shards"))
    emit(str(output))
