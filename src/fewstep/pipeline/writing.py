"""Draw the images of a request, and write each as soon as it is there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from fewstep.core.progress import stdout_errors
from fewstep.core.types import UserError

if TYPE_CHECKING:
    from PIL import Image

    from fewstep.images.record import Record
    from fewstep.pipeline.filenames import FilenamePattern
    from fewstep.pipeline.params import Request
    from fewstep.pipeline.pipeline import OnStep, Pipeline

    Drawn: TypeAlias = tuple[Image.Image, Record, float]
    Written: TypeAlias = tuple[Path | None, Record, float]


def draw(
    pipe: Pipeline, request: Request, on_step: OnStep, copies: int = 1, exact: bool = False
) -> Iterator[Drawn]:
    """Draw the images of a request.

    Args:
        pipe: the pipeline.
        request: prompts, seeds and options.
        on_step: called after each solver step.
        copies: the batch size with which a single image was made. A net may round differently in another
            batch size, so an image that is made again to the last bit needs the same one.
        exact: let no batch be larger than ``copies``. Several images that are made again need this.

    Yields:
        image, record, and its share of the time in seconds.
    """
    from fewstep.images.metadata import CHUNK
    from fewstep.images.record import Record

    single = len(request.jobs) == 1
    if single:
        request = replace(request, jobs=request.jobs * copies)
    started = time.perf_counter()
    for batch in pipe.run(request, on_step, copies if exact else max(copies, pipe.max_batch)):
        images = batch[:1] if single else batch
        seconds = (time.perf_counter() - started) / len(images)
        for image in images:
            yield image, Record.parse(image.info[CHUNK]), seconds
        started = time.perf_counter()


def write(drawn: Iterator[Drawn], output: FilenamePattern | StandardOutput) -> Iterator[Written]:
    """Write each image when it is drawn, and yield path, record and seconds."""
    for index, (image, record, seconds) in enumerate(drawn, 1):
        yield output.save(image, index, record), record, seconds


def write_grid(drawn: Iterator[Drawn], output: FilenamePattern | StandardOutput) -> Iterator[Written]:
    """Write all images as one image grid. Its metadata lists the records of the images."""
    from fewstep.images.grid import contact_sheet
    from fewstep.images.metadata import CHUNK
    from fewstep.images.record import SHEET

    images, records, seconds = zip(*drawn, strict=True)
    grid = contact_sheet(images)
    grid.info[CHUNK] = json.dumps({SHEET: [asdict(record) for record in records]})
    path = output.save(grid, 1, records[0])
    yield from ((path, *each) for each in zip(records, seconds, strict=True))


@dataclass(frozen=True)
class StandardOutput:
    """Writes one image to standard output, as a PNG.

    :class:`fewstep.pipeline.filenames.FilenamePattern` writes files.
    """

    stream: BinaryIO
    suffix: str = ".png"

    def save(self, image: Image.Image, index: int, record: Record) -> None:
        """Write an image with its metadata.

        Raises:
            UserError: standard output is full or broken.
            BrokenPipeError: its reader is gone.
        """
        from fewstep.images.io import encode

        data = encode(image, Path(f"image{self.suffix}"))
        with stdout_errors():
            self.stream.write(data)
            self.stream.flush()


def standard_output() -> StandardOutput:
    """Return standard output as a target for an image.

    Raises:
        UserError: it is closed, or a terminal.
    """
    if sys.stdout is None or not hasattr(sys.stdout, "buffer"):
        raise UserError("standard output is closed: give -o a name")
    if sys.stdout.isatty():
        raise UserError("standard output is a terminal, which shows no image: send it on, as in -o - > x.png")
    return StandardOutput(sys.stdout.buffer)
