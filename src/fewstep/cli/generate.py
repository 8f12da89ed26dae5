"""The command ``generate``."""

from __future__ import annotations

import dataclasses
import json as jsons
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeAlias

from cyclopts import Parameter, Token

from fewstep.core.progress import emit, printable, say, stdout_errors
from fewstep.core.types import UserError
from fewstep.inference.options import TorchOptions
from fewstep.pipeline.loading import load
from fewstep.pipeline.resolve import builtin_models, is_bundle, parse_family

if TYPE_CHECKING:
    from PIL import Image

    from fewstep.images.record import Record
    from fewstep.pipeline.filenames import FilenamePattern
    from fewstep.pipeline.params import Request
    from fewstep.pipeline.pipeline import Pipeline

    Drawn: TypeAlias = tuple[Image.Image, Record, float]
    Written: TypeAlias = tuple[Path | None, Record, float]

BATCH = 8
PLAIN = TorchOptions()

_WORD = re.compile(r"(?=.*[^\W\d_])[\w'’-]+[,.;:!?]?")
"""One word, perhaps with a mark behind it."""

SAID = ("path", "prompt", "seed", "steps", "model", "seconds")
"""What ``--json`` says of each picture."""
STREAM = "-"
"""Standard input as a prompt or an input image, standard output as ``-o``; plain text anywhere else."""
_FILES = {
    ".safetensors": "with its option, as in --lora A --lora B",
    ".txt": "of prompts with --prompts",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "with --image, or its name with -o"),
}
"""Endings of a prompt that may have been meant as a file, and how to give that."""


class PromptsWarning(UserWarning):
    """Several prompts may have been meant as one, or one as a file."""


class ModelWarning(UserWarning):
    """A picture is made again with another model than the first time."""


def read_whole(hint: Any, tokens: Sequence[Token]) -> int:
    """Read a whole number: cyclopts would round 2.5 to 2."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


Whole = Annotated[int, Parameter(converter=read_whole)]
MaybeWhole = Annotated[int | None, Parameter(converter=read_whole)]


def generate(
    *prompts: str,
    prompts_file: Annotated[str | None, Parameter(name="--prompts")] = None,
    steps: MaybeWhole = None,
    num_images: Annotated[MaybeWhole, Parameter(name=["-n", "--num-images"])] = None,
    seed: MaybeWhole = None,
    style: str | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    image: str | None = None,
    strength: float | None = None,
    model: str | None = None,
    backend: str | None = None,
    output: Annotated[str | None, Parameter(name=["-o", "--output"])] = None,
    grid: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    again: Annotated[str | None, Parameter(name="--from")] = None,
    threads: MaybeWhole = None,
    torch: TorchOptions = PLAIN,
) -> None:
    """Draw pictures of prompts, and print the path of each.

    A picture is fixed by its prompt, seed, steps and model. Picture i of a prompt has the seed SEED + i.

    Args:
        prompts: What to draw; several prompts make several pictures, "-" reads one a line from stdin.
        prompts_file: A text file with one prompt a line.
        steps: Number of steps: 1 to 8, or to 100 for a model with guidance or of many steps.
            [default: the model's own]
        num_images: Pictures of each prompt. [default: 1]
        seed: 0 to 4294967295. [default: drawn]
        style: A style word of the model; adds ", STYLE style" to each prompt.
        guidance: Guidance scale, for a model that has guidance.
        negative_prompt: What to steer away from, for a model that has guidance.
        image: A picture to start from; "-" reads it from standard input.
        strength: How much of that picture to give up, 0 to 1. [default: 0.95]
        model: A shipped model, a folder, also of a finished run, or a hub name (org/name); sd3: or flux: in
            front says its family.
            [default: pocket]
        backend: Require onnx, openvino, executorch or torch; or the import path of your own engine for a
            bundle.
        output: A .png, .jpg or .webp file (overwritten), a folder, a pattern with {index} {seed} {prompt}
            {model} {steps}, or "-" for standard output. Folders and patterns never overwrite: a taken name
            gets -2, -3, …. [default: PROMPT-SEED.png in the current folder]
        grid: Write one contact sheet instead of single pictures.
        json: Print one JSON object a picture instead of its path.
        again: Make this image, or those of this contact sheet, again; other options change what they name.
        threads: Processor threads. [default: all cores]
        torch: How a PyTorch model shall run.
    """
    options: dict[str, Any] = {
        "seed": seed, "steps": steps, "style": style, "guidance": guidance, "negative": negative_prompt,
        "image": input_image(image, prompts), "strength": strength,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    check_quotes(prompts)
    check_files(prompts)
    texts = read_prompts(prompts, prompts_file)
    record, whole_sheet = None, False
    if again is not None:
        from fewstep.images.record import read_records

        records = read_records(again)
        record, whole_sheet = records[0], len(records) > 1
        made, each = made_of(records)
        texts, num_images = texts or made, each if num_images is None else num_images
        torch = restore_torch_options(record, torch, model)
        given, texts, model = restore_request(record, given, texts, model)
    num_images = 1 if num_images is None else num_images
    name = destination(output, 1 if grid else len(texts) * num_images, json)
    together = batch_of(record, len(texts) * num_images)
    wish = dataclasses.replace(torch, batch=together, image="image" in given)
    if not is_bundle(model):  # others take long to load
        from fewstep.pipeline.params import check_values

        check_values(texts, **given, n=num_images)
    pipe = load(model, backend, threads, **vars(wish))
    for line in pipe.plan:
        say(line)
    if torch.compile:
        say("compiling while the first picture is drawn, about a minute")
    request = pipe.request(texts, n=num_images, **given)
    if record is not None and record.hash != (pipe.bundle.digest if pipe.bundle else ""):
        warnings.warn("the model is not the one that made that picture", ModelWarning, stacklevel=1)
    if grid:
        from fewstep.images.grid import check_sheet

        check_sheet(len(request.jobs), pipe.size, name.suffix)
    drawn = draw(pipe, request, 1 if record is None else together, whole_sheet)
    told: Path | None = None
    for path, made, seconds in (write_sheet if grid else write)(drawn, name):
        facts = {"path": str(path), "seconds": round(seconds, 3), **dataclasses.asdict(made)}
        if json:
            emit(jsons.dumps({name: facts[name] for name in SAID}))
        elif path is not None and path != told:  # a contact sheet is one file of many images
            emit_path(path)
        told = path


def batch_of(record: Record | None, images: int) -> int:
    """How many images run through the net together: as when those of ``record`` were made.

    Raises:
        UserError: the record's number is out of its range.
    """
    if record is None:
        return max(1, min(BATCH, images))
    from fewstep.core.validate import MOST_AT_ONCE, check_int

    return check_int("batch", record.batch, 1, MOST_AT_ONCE)


def destination(output: str | None, images: int, json: bool) -> FilenamePattern | StandardOutput:
    """Where the files of a call go.

    Args:
        output: the option ``-o``.
        images: files of the call.
        json: whether lines of JSON are printed.

    Raises:
        UserError: that cannot be written.
    """
    if output == STREAM or _is_stdout(output):
        if images > 1 or json:
            what = "lines of --json" if json else f"{images} images"
            raise UserError(f"standard output takes one image and nothing else: give -o a name for {what}")
        return standard_output()
    from fewstep.pipeline.filenames import names

    return names(output, images)


def _is_stdout(output: str | None) -> bool:
    """Whether a path such as ``/dev/stdout`` is what this process prints to."""
    if output is None or not output.startswith(("/dev/", "/proc/")) or sys.stdout is None:
        return False
    try:
        return os.path.samestat(os.stat(output), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def check_quotes(prompts: Sequence[str]) -> None:
    """Warn of several prompts of one word each: a prompt without quotes comes as such."""
    if len(prompts) > 1 and all(_WORD.fullmatch(text) for text in prompts):
        whole = " ".join(prompts)
        whole = whole if len(whole) <= 60 else f"{whole[:60]}…"
        text = f'these are {len(prompts)} prompts of one word each; if one was meant, quote it: "{whole}"'
        warnings.warn(text, PromptsWarning, stacklevel=2)


def check_files(prompts: Sequence[str]) -> None:
    """Warn of prompts that are files: an option takes one value, and what follows it is a prompt."""
    for text in prompts:
        end = Path(text).suffix.lower()
        # A single word may be the name of a folder by chance.
        there = os.path.isfile(text) or (os.sep in text and os.path.exists(text))
        if text != STREAM and (there or end in _FILES):
            shown = text if len(text) <= 60 else f"…{text[-60:]}"
            how = _FILES.get(end, "with the option that it is for")
            line = f"the prompt {shown} looks like a file, and is drawn as text: give a file {how}"
            warnings.warn(line, PromptsWarning, stacklevel=2)


def read_prompts(prompts: Sequence[str], path: str | None) -> list[str]:
    """Prompts of the command line, then of the file; a bare ``-`` stands for the lines of stdin.

    Raises:
        UserError: the file cannot be read as UTF-8, or stdin is closed.
    """
    texts: list[str] = []
    for text in prompts:
        texts += _lines("standard input", _stdin("prompt")) if text == STREAM else [text]
    if path is not None:
        try:
            texts += _lines(path, Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the prompts in {path}: {error.strerror}") from None
    return texts


def input_image(image: str | None, prompts: Sequence[str]) -> str | Image.Image | None:
    """The option ``--image``, where a bare ``-`` stands for an image from standard input.

    Raises:
        UserError: standard input is no image, closed, or holds the prompts.
    """
    if image != STREAM:
        return image
    from fewstep.images.decode import decode
    from fewstep.images.io import MOST_BYTES

    if STREAM in prompts:
        raise UserError("standard input holds the prompts or the image: give one of them otherwise")
    data = _stdin("image", MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"standard input is not an image that can be read: more than {MOST_BYTES >> 20} MiB")
    return decode(data, "standard input")


def _stdin(what: str, most: int = -1) -> bytes:
    if sys.stdin is None:  # closed by whoever started us
        raise UserError(f"there is no {what} in standard input: it is closed")
    try:
        return sys.stdin.buffer.read(most)
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}") from None


def _lines(name: str, data: bytes) -> list[str]:
    try:
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"the prompts in {name} are not UTF-8 text") from None
    if not lines:
        raise UserError(f"there is no prompt in {name}")
    return lines


def restore_request(
    record: Record, given: dict[str, Any], texts: list[str], model: str | None
) -> tuple[dict[str, Any], list[str], str | None]:
    """What made the picture of ``record``, with what the user gave now on top.

    Raises:
        UserError: its model must be named, or its input picture is not there any more.
    """
    from fewstep.images.io import file_hash

    place = Path(parse_family(record.model)[1])
    if model is None and not (place.exists() or record.model in [at.name for at in builtin_models()]):
        # A picture from a stranger must not choose what is downloaded.
        raise UserError(f"that picture was made by {record.model}: say so with --model {record.model}")
    made: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("seed", "steps", "guidance", "negative", "image", "strength")
        if getattr(record, name) is not None
    }
    if "image" in made and "image" not in given:
        path = made["image"]
        if not path:
            raise UserError("its input picture was no file: give it with --image")
        if not Path(path).is_file() or file_hash(path) != record.image_sha256:
            raise UserError(f"its input picture {path} is gone or has changed: give it with --image")
    return {**made, **given}, texts or [record.prompt], record.model if model is None else model


def restore_torch_options(record: Record, wish: TorchOptions, model: str | None) -> TorchOptions:
    """How the PyTorch model of ``record`` ran, with what the user gave now on top; ``wish`` for any other."""
    if model not in (None, record.model):
        return wish
    if record.lora and not wish.lora:
        wish = dataclasses.replace(wish, lora=record.lora)
    if record.bits is None:
        return wish
    made: dict[str, Any] = {
        "bits": record.bits, "student": record.student, "tiny_decoder": record.tiny_decoder,
        "size": f"{record.size[0]}x{record.size[1]}",
    }  # fmt: skip
    return dataclasses.replace(wish, **{name: at for name, at in made.items() if getattr(wish, name) is None})


def made_of(records: Sequence[Record]) -> tuple[list[str], int]:
    """The prompts, and the number of images of each, that made a contact sheet, or a single image.

    Args:
        records: of its images, in order.

    Raises:
        UserError: the images are not those of one call.
    """
    first = records[0]
    number = next((at for at, record in enumerate(records) if at and record.seed == first.seed), len(records))
    prompts = [record.prompt for record in records[::number]]
    jobs = [(prompt, first.seed + index) for prompt in prompts for index in range(number)]
    alike = {dataclasses.replace(record, prompt="", seed=0, batch=1) for record in records}
    if len(alike) > 1 or jobs != [(record.prompt, record.seed) for record in records]:
        raise UserError("the images of that sheet were not made by one call, so one cannot make them again")
    return prompts, number


def draw(pipe: Pipeline, request: Request, copies: int = 1, exact: bool = False) -> Iterator[Drawn]:
    """Draw, with a progress bar where a person waits for long.

    Args:
        pipe: what draws.
        request: what.
        copies: the batch size that a single picture was made with, when it must come out the same to the
            last bit: a net may round differently in a larger batch, so it runs in as large a one.
        exact: whether no batch may be larger than that, which several pictures need for the same.

    Yields:
        picture, record, and its share of the time in seconds.
    """
    from fewstep.images.metadata import CHUNK
    from fewstep.images.record import Record

    alone = len(request.jobs) == 1
    if alone:
        request = dataclasses.replace(request, jobs=request.jobs * copies)
    with Progress() as progress:
        begun = time.perf_counter()
        for group in pipe.run(request, progress, copies if exact else max(copies, pipe.max_batch)):
            wanted = group[:1] if alone else group
            seconds = (time.perf_counter() - begun) / len(wanted)
            for image in wanted:
                yield image, Record.parse(image.info[CHUNK]), seconds
            begun = time.perf_counter()


def write(drawn: Iterator[Drawn], name: FilenamePattern | StandardOutput) -> Iterator[Written]:
    """Write each image as soon as it is drawn."""
    for index, (image, record, seconds) in enumerate(drawn, 1):
        yield name.save(image, index, record), record, seconds


def write_sheet(drawn: Iterator[Drawn], name: FilenamePattern | StandardOutput) -> Iterator[Written]:
    """Write one contact sheet; its metadata lists the records of all images."""
    from fewstep.images.grid import contact_sheet
    from fewstep.images.metadata import CHUNK
    from fewstep.images.record import SHEET

    images, records, seconds = zip(*drawn, strict=True)
    sheet = contact_sheet(images)
    sheet.info[CHUNK] = jsons.dumps({SHEET: [dataclasses.asdict(record) for record in records]})
    path = name.save(sheet, 1, records[0])
    yield from ((path, *made) for made in zip(records, seconds, strict=True))


@dataclass(frozen=True)
class StandardOutput:
    """Writes one image to standard output, as a PNG.

    Files are named by :class:`fewstep.pipeline.filenames.FilenamePattern`.
    """

    stream: BinaryIO
    suffix: str = ".png"

    def save(self, image: Image.Image, index: int, record: Record) -> None:
        """Write an image with its metadata.

        Raises:
            UserError: standard output is full or broken.
            BrokenPipeError: nobody reads it any more.
        """
        from fewstep.images.io import encode

        data = encode(image, Path(f"image{self.suffix}"))
        with stdout_errors():
            self.stream.write(data)
            self.stream.flush()


def standard_output() -> StandardOutput:
    """Standard output as a place for an image.

    Raises:
        UserError: it is closed, or a terminal.
    """
    if sys.stdout is None or not hasattr(sys.stdout, "buffer"):
        raise UserError("standard output is closed: give -o a name")
    if sys.stdout.isatty():
        raise UserError("standard output is a terminal, which shows no image: send it on, as in -o - > x.png")
    return StandardOutput(sys.stdout.buffer)


def emit_path(path: Path) -> None:
    """Print a path at once: byte for byte as it is, but on a terminal without signs that steer it.

    Raises:
        UserError: standard output is full or broken.
        BrokenPipeError: nobody reads it any more.
    """
    text = str(path)
    if sys.stdout is None or sys.stdout.isatty():
        emit(printable(text))
        return
    with stdout_errors():
        if any("\udc80" <= sign <= "\udcff" for sign in text) and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()  # bytes that are no UTF-8
            sys.stdout.buffer.write(os.fsencode(text) + b"\n")
            sys.stdout.flush()
        else:
            print(text, flush=True)


class Progress:
    """A bar on standard error, on a terminal only, and only once drawing has taken a while."""

    PATIENCE = 0.5
    """Seconds before the bar appears; importing it takes a tenth of a second."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._wanted = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, step: int, steps: int, preview: object) -> None:
        """A step was made (``fewstep.pipeline.pipeline.OnStep``)."""
        if self._bar is None:
            if not self._wanted or time.perf_counter() - self._begun < self.PATIENCE:
                return
            from rich.console import Console
            from rich.progress import Progress as Bar

            # rich would send what is printed to a file or pipe to the terminal as well.
            shared = sys.stdout.isatty()
            self._bar = Bar(console=Console(stderr=True), transient=True, redirect_stdout=shared)
            self._bar.start()
            self._task = self._bar.add_task("drawing", total=steps)
        self._bar.update(self._task, completed=step)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
