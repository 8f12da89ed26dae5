"""``fewstep data``: pictures to learn from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fewstep.files import held
from fewstep.types import UserError

app = App(name="data", help="Pictures to learn from: stickers and scenes, your own folders, latents.")
Out = Annotated[Path, Parameter(name=["--output", "-o"])]


@app.command
def stickers(
    *,
    output: Out = Path("data/stickers"),
    size: int = 128,
    pictures: int = 40_000,
    scenes: float = 0.2,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Fetch openly licensed emoji, rasterise them and write captioned stickers and scenes as shards.

    Args:
        output: Folder of the data set; an interrupted run goes on where it stopped.
        size: Side of the pictures, pixels.
        pictures: How many training pictures.
        scenes: Share of pictures with several things.
        seed: Another seed, another set.
        workers: Processes; 0 takes one a core.
    """
    from fewstep.data.stickers import build

    if size not in (64, 128, 256) or pictures < 1 or not 0 <= scenes <= 1:
        raise UserError("--size must be 64, 128 or 256, --pictures at least 1, --scenes between 0 and 1")
    with held(output, "filled"), _bar() as say:
        build(
            output,
            size=size,
            pictures=pictures,
            scenes=scenes,
            seed=seed,
            workers=workers or os.cpu_count() or 1,
            progress=say,
        )
    print(output)


@app.command
def folder(source: Path, *, output: Out, size: int = 128) -> None:
    """Write shards of a folder of pictures with a .txt caption beside each.

    Args:
        source: The folder, searched with its subfolders.
        output: Folder for the shards.
        size: Side of the square that each picture is cropped and resized to, pixels.
    """
    from fewstep.data.shards import write_folder

    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if not 8 <= size <= 4096:
        raise UserError(f"--size must lie between 8 and 4096, not {size}")
    with held(output, "filled"), _bar() as say:
        write_folder(source, output, size, 1000, lambda done, total: say("write", done, total))
    print(output)


class _bar:
    """A progress bar a stage, on a terminal; a line a stage elsewhere."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self._tasks: dict[str, int] = {}
        self._progress.start()
        return self._say

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _say(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
            if not sys.stderr.isatty():
                print(f"fewstep: {stage}", file=sys.stderr)
        self._progress.update(
            self._progress.tasks[self._tasks[stage]].id, completed=done, total=total or None
        )
