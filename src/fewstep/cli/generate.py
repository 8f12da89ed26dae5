"""The command ``generate``."""

from __future__ import annotations

import dataclasses
import json as jsons
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.cli.options import (
    STREAM,
    Flag,
    check_files,
    check_quotes,
    read_input_image,
    read_prompts,
)
from fewstep.core.progress import emit, printable, say, stdout_errors
from fewstep.core.types import UserError
from fewstep.inference.options import TorchOptions
from fewstep.pipeline.loading import load
from fewstep.pipeline.resolve import is_bundle
from fewstep.pipeline.writing import StandardOutput, draw, standard_output, write, write_grid

if TYPE_CHECKING:
    from fewstep.images.record import Record
    from fewstep.pipeline.filenames import FilenamePattern

BATCH_SIZE = 8
"""Most images that a PyTorch model draws at once."""

DEFAULTS = TorchOptions()

JSON_FIELDS = ("path", "prompt", "seed", "steps", "model", "seconds")
"""Fields that ``--json`` prints of each image."""


def generate(
    *prompts: str,
    prompts_file: Annotated[str | None, Parameter(name="--prompts", metavar="PATH")] = None,
    steps: int | None = None,
    num_images: Annotated[int | None, Parameter(name=["-n", "--num-images"])] = None,
    seed: int | None = None,
    style: str | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    image: Annotated[str | None, Parameter(metavar="PATH")] = None,
    strength: float | None = None,
    model: Annotated[str | None, Parameter(metavar="MODEL")] = None,
    backend: Annotated[str | None, Parameter(metavar="NAME")] = None,
    output: Annotated[str | None, Parameter(name=["-o", "--output"], metavar="PATH")] = None,
    grid: Flag = False,
    json: Flag = False,
    source: Annotated[str | None, Parameter(name="--from", metavar="PATH")] = None,
    threads: int | None = None,
    torch: TorchOptions = DEFAULTS,
) -> None:
    """Generate images from text prompts, and print the path of each.

    Prompt, seed, steps and model determine an image. Image i of a prompt has the seed SEED + i.

    Args:
        prompts: Text prompts. "-" reads one per line from standard input.
        prompts_file: A text file with one prompt per line.
        steps: Number of steps: 1 to 8, or 1 to 100 for a model with guidance or of many steps.
            [default: the model's own]
        num_images: Images per prompt. [default: 1]
        seed: Seed of the first image, 0 to 4294967295. [default: random]
        style: A style word of the model. It adds ", STYLE style" to each prompt.
        guidance: Guidance scale, for a model that has guidance.
        negative_prompt: What to steer away from, for a model that has guidance.
        image: An image to start from. "-" reads it from standard input.
        strength: How much of that image changes, 0 to 1. [default: 0.95]
        model: An installed model, a folder, a run folder, or a hub name (org/name). A prefix sd3: or flux:
            names its family. [default: pocket]
        backend: onnx, openvino, executorch or torch, or the import path of your own engine for a bundle.
            [default: the model's own]
        output: A .png, .jpg or .webp file (overwritten), a folder, a pattern with {index} {seed} {prompt}
            {model} {steps}, or "-" for standard output. Folders and patterns never overwrite: a name that
            exists gets -2, -3, …. [default: PROMPT-SEED.png in the current folder]
        grid: Write one image grid instead of single images.
        json: Print one JSON object per image instead of its path.
        source: Make this image, or the images of this image grid, again. Other options change what they
            name.
        threads: Processor threads. [default: all cores]
        torch: How a PyTorch model runs.
    """
    options: dict[str, Any] = {
        "seed": seed, "steps": steps, "style": style, "guidance": guidance, "negative": negative_prompt,
        "image": read_input_image(image, prompts), "strength": strength,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    check_quotes(prompts)
    check_files(prompts)
    texts = read_prompts(prompts, prompts_file)
    record, is_grid = None, False
    if source is not None:
        from fewstep.images.record import read_records
        from fewstep.pipeline.repeat import prompts_of, restore_request, restore_torch_options

        records = read_records(source)
        record, is_grid = records[0], len(records) > 1
        recorded, number = prompts_of(records)
        texts, num_images = texts or recorded, number if num_images is None else num_images
        torch = restore_torch_options(record, torch, model)
        given, texts, model = restore_request(record, given, texts, model)
    num_images = 1 if num_images is None else num_images
    target = _target(output, 1 if grid else len(texts) * num_images, json)
    batch = _batch_size(record, len(texts) * num_images)
    torch = dataclasses.replace(torch, batch=batch, image="image" in given)
    if not is_bundle(model):  # other models take long to load
        from fewstep.pipeline.params import check_values

        check_values(texts, **given, n=num_images)
    pipe = load(model, backend, threads, **vars(torch))
    for line in pipe.plan:
        say(line)
    if torch.compile:
        say("the first image compiles the model, about a minute")
    request = pipe.request(texts, n=num_images, **given)
    if record is not None and record.hash != (pipe.bundle.digest if pipe.bundle else ""):
        from fewstep.pipeline.repeat import ModelWarning

        warnings.warn("the model is not the one that made that image", ModelWarning, stacklevel=1)
    if grid:
        from fewstep.images.grid import check_sheet

        check_sheet(len(request.jobs), pipe.size, target.suffix)
    printed: Path | None = None
    with ProgressBar() as progress:
        drawn = draw(pipe, request, progress, 1 if record is None else batch, is_grid)
        for path, made, seconds in (write_grid if grid else write)(drawn, target):
            facts = {"path": str(path), "seconds": round(seconds, 3), **dataclasses.asdict(made)}
            if json:
                emit(jsons.dumps({name: facts[name] for name in JSON_FIELDS}))
            elif path is not None and path != printed:  # an image grid is one file of many images
                _emit_path(path)
            printed = path


def _batch_size(record: Record | None, images: int) -> int:
    """Return the batch size: that of ``record``, if its image is made again."""
    if record is None:
        return max(1, min(BATCH_SIZE, images))
    from fewstep.pipeline.repeat import batch_size

    return batch_size(record)


def _target(output: str | None, images: int, json: bool) -> FilenamePattern | StandardOutput:
    """Return where the images go.

    Args:
        output: the option ``-o``.
        images: number of files.
        json: whether lines of JSON are printed.

    Raises:
        UserError: it cannot be written.
    """
    if output == STREAM or _is_stdout(output):
        if images > 1 or json:
            what = "lines of --json" if json else f"{images} images"
            raise UserError(f"standard output takes one image and nothing else: give -o a name for {what}")
        return standard_output()
    from fewstep.pipeline.filenames import names

    return names(output, images)


def _is_stdout(output: str | None) -> bool:
    """Whether a path such as ``/dev/stdout`` is the standard output of this process."""
    if output is None or not output.startswith(("/dev/", "/proc/")) or sys.stdout is None:
        return False
    try:
        return os.path.samestat(os.stat(output), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def _emit_path(path: Path) -> None:
    """Print a path byte for byte. On a terminal, replace characters that steer it.

    Raises:
        UserError: standard output is full or broken.
        BrokenPipeError: its reader is gone.
    """
    text = str(path)
    if sys.stdout is None or sys.stdout.isatty():
        emit(printable(text))
        return
    with stdout_errors():
        if any("\udc80" <= character <= "\udcff" for character in text) and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()  # the path is not UTF-8
            sys.stdout.buffer.write(os.fsencode(text) + b"\n")
            sys.stdout.flush()
        else:
            print(text, flush=True)


class ProgressBar:
    """A bar on standard error, on a terminal only, and only if drawing takes a while."""

    DELAY = 0.5
    """Seconds before the bar appears. Its import takes 0.1 s."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._on_terminal = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, step: int, steps: int, preview: object) -> None:
        """Show that a solver step is done (:data:`fewstep.pipeline.pipeline.OnStep`)."""
        if self._bar is None:
            if not self._on_terminal or time.perf_counter() - self._started < self.DELAY:
                return
            from rich.console import Console
            from rich.progress import Progress

            # Otherwise rich copies to the terminal what goes to a file or pipe.
            redirect = sys.stdout.isatty()
            self._bar = Progress(console=Console(stderr=True), transient=True, redirect_stdout=redirect)
            self._bar.start()
            self._task = self._bar.add_task("drawing", total=steps)
        self._bar.update(self._task, completed=step)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
