"""Images: pixels and arrays, the record of how one was made, safe writing."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fewstep.core import atomic
from fewstep.core.types import Array, UserError
from fewstep.images import metadata
from fewstep.images.metadata import CHUNK, PARAMETERS

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs what it raises too
Image.preinit()  # Pillow does this at the first save; here it runs while the model loads

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Of the files that are written, and their formats. PNG and WebP keep all pixels, JPEG is lossy."""
MOST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
"""Pixels along a side that a format can hold."""
SHEET_PIXELS = 2 * 89_478_485
"""Of a contact sheet: more than that Pillow does not open."""
_MODES = {
    "PNG": ("1", "L", "LA", "P", "I;16", "RGB", "RGBA"),
    "JPEG": ("L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
}
"""Modes that a format keeps as they are."""
JPEG_QUALITY = 95
SHEET = "sheet"
"""The one field of a contact sheet's metadata: the list of its images' records."""
_NEGATIVE = "Negative prompt:"
_GAP = 4
"""Pixels between the images of a contact sheet."""


class RecordWarning(UserWarning):
    """A record has fields that this version does not know."""


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Formats that are read, by Pillow's names. Of others some start programs (EPS: Ghostscript)."""
MOST_BYTES = 2**28
"""Of an image's file."""
MOST_PIXELS = 2**26
"""Of an image when it is decoded: 67 megapixels, so that all copies of it take less than 1 GB."""
_SMALLER = {"WEBP": MOST_PIXELS // 2, "AVIF": MOST_PIXELS // 2}
"""Formats whose decoders hold more copies at once."""
_OPAQUE = {"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}
_CLEAR = {"LA", "La", "P", "PA", "RGBA", "RGBa"}
_HALF = 0.5 / 255
_SILENCING = threading.Lock()
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
"""Tags of TIFF and EXIF."""


@dataclass(frozen=True)
class Record:
    """How a picture was made: enough to make it again.

    Attributes:
        prompt: the prompt, style included.
        seed: of this picture.
        steps: number of steps.
        model: the model as the user named it (name, folder or hub name).
        hash: the bundle's digest; empty for a model that is no bundle.
        size: width and height in pixels.
        guidance: guidance scale; ``None`` when it is distilled into the model.
        negative: negative prompt, if any.
        image: path of the input picture, if any.
        image_sha256: the hash of that file; empty when it came as a Pillow image.
        strength: strength of image-to-image, with an input picture only.
        batch: how many pictures went through the net together. Rounding depends on it.
        bits: of the net's weights, for a PyTorch model whose parts come and go.
        student: what was laid over that model, if anything.
        lora: LoRAs that were added to that model, ``FILE:WEIGHT`` each, if any.
        tiny_decoder: the tiny autoencoder that decoded instead of its own, if any.
        version: of fewstep.
    """

    prompt: str
    seed: int
    steps: int
    model: str
    hash: str
    size: tuple[int, int]
    guidance: float | None = None
    negative: str | None = None
    image: str | None = None
    image_sha256: str | None = None
    strength: float | None = None
    batch: int = 1
    bits: int | None = None
    student: str | None = None
    lora: tuple[str, ...] | None = None
    tiny_decoder: str | None = None
    version: str = ""

    def json(self) -> str:
        """One line of ASCII."""
        facts = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(facts)

    @classmethod
    def parse(cls, text: str, where: str = "that record") -> Record:
        """The record that :meth:`json` wrote. Fields that this version does not know are passed over.

        Raises:
            UserError: it has another shape; ``where`` names it.
        """
        return cls.of(read_json(text, where), where)

    @classmethod
    def of(cls, facts: Any, where: str) -> Record:
        """The record that the dictionary ``facts`` holds.

        Raises:
            UserError: it has another shape; ``where`` names it.
        """
        from fewstep.core import json_io

        return json_io.convert(facts, cls, where)

    def parameters(self) -> str:
        """The text that AUTOMATIC1111's web UI and its readers understand.

        A value that would be taken for several is quoted as they do it. A prompt that begins like the line
        of the negative prompt gets a small letter there.
        """
        prompt = self.prompt
        if prompt.lstrip().startswith(_NEGATIVE):
            prompt = prompt.replace(_NEGATIVE[0], _NEGATIVE[0].lower(), 1)
        lines = [prompt]
        if self.negative:
            lines.append(f"{_NEGATIVE} {self.negative}")
        facts = {
            "Steps": self.steps,
            "Sampler": "Euler",
            "CFG scale": 1 if self.guidance is None else self.guidance,
            "Seed": self.seed,
            "Size": f"{self.size[0]}x{self.size[1]}",
            "Model hash": self.hash[:10],
            "Model": self.model,
            "Denoising strength": self.strength,
            "Version": f"fewstep {self.version}",
        }
        known = {name: value for name, value in facts.items() if value not in (None, "")}
        lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in known.items()))
        return "\n".join(lines)

    def stamp(self, image: Image.Image) -> Image.Image:
        """Put the record into ``image.info``, where :func:`save` finds it."""
        image.info.update({PARAMETERS: self.parameters(), CHUNK: self.json()})
        return image


def _quoted(value: str) -> str:
    """A value of the ``parameters``: a JSON string where a reader would see more than one value, or less."""
    if value == value.strip() and not any(sign in value for sign in ',:"\n\r'):
        return value
    return json.dumps(value, ensure_ascii=False)


def read_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object that the text ``fewstep`` of an image holds.

    Raises:
        UserError: it is none, or nested too deeply; ``where`` names it.
    """
    from fewstep.core import json_io

    try:
        # Not msgspec: it refuses paths that are no UTF-8, which Record.json keeps.
        facts = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise UserError(f"the metadata of {where} is damaged") from None
    return json_io.convert(facts, dict[str, Any], f"the metadata of {where}")


def _finite(text: str) -> float:
    """A number of JSON. ``NaN`` and ``Infinity``, which Python would read too, are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def read_records(path: str | Path) -> list[Record]:
    """The records of one of our images: one, or those of all images on a contact sheet.

    Fields that this version does not know are named by a warning.

    Raises:
        UserError: no readable image, none of ours, or its metadata is damaged.
    """
    text = read_info(path).get(CHUNK)
    if text is None:
        raise UserError(f"{path} was not made by fewstep, or has lost its metadata")
    facts = read_json(text, str(path))
    return records_of(facts, str(path))


def records_of(facts: dict[str, Any], where: str) -> list[Record]:
    """The records that the metadata of an image hold, as :func:`read_records` reads them.

    Raises:
        UserError: they are damaged; ``where`` names the image.
    """
    from fewstep.core import json_io

    every = [facts]
    if SHEET in facts:
        every = json_io.convert(facts[SHEET], list[dict[str, Any]], f"the metadata of {where}")
    records = [Record.of(each, f"the metadata of {where}") for each in every]
    if not records:
        raise UserError(f"the metadata of {where} is damaged: it lists no image")
    known = {field.name for field in dataclasses.fields(Record)}
    if unknown := sorted({name for each in every for name in each} - known):
        text = f"{where} was made with what this version does not know, which is left out: "
        warnings.warn(text + ", ".join(unknown), RecordWarning, stacklevel=3)
    return records


def read_record(path: str | Path) -> Record:
    """The record of one of our images that is no contact sheet.

    Raises:
        UserError: no readable image, none of ours, a sheet, or damaged metadata.
    """
    records = read_records(path)
    if len(records) > 1:
        raise UserError(f"{path} is not a single image: it is a contact sheet of {len(records)}")
    return records[0]


def read_info(path: str | Path) -> dict[str, str]:
    """The texts in an image file that we write or others know: ``parameters`` and ``fewstep``.

    The pixels are not decoded.

    Raises:
        UserError: no image of a format that is written here.
    """
    data = read(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata
            with Image.open(io.BytesIO(data), formats=_formats(SUFFIXES.values())) as image:
                return metadata.texts(image)
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a picture that can be read: no PNG, JPEG or WebP") from None
    except Exception as error:  # a decoder raises whatever goes wrong in it first
        raise UserError(f"{path} is not a picture that can be read: {_reason(error)}") from None


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file; see :func:`decode`.

    Raises:
        UserError: it cannot be read, is no image, or is damaged.
    """
    return decode(read(path), str(path))


def read(path: str | Path) -> bytes:
    """The bytes of an image file, which may be a pipe.

    Raises:
        UserError: it cannot be read, or has more than :data:`MOST_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a picture that can be read: {_reason(error)}") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{path} is not a picture that can be read: it has more than {MOST_BYTES >> 20} MiB")
    return data


def decode(data: bytes, where: str) -> Image.Image:
    """Decode the first frame of an image file. Its content alone tells which of :data:`FORMATS` it is.

    Args:
        data: the file.
        where: what it is called in errors.

    Raises:
        UserError: it is of no such format, larger than :data:`MOST_PIXELS`, or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                _limit(image, where)
                with _silent() if image.format == "TIFF" else nullcontext():
                    image.load()
                return image
    except UserError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UserError(f"{where} is not a picture that can be read: none of {known}") from None
    except Exception as error:  # a decoder raises whatever goes wrong in it first
        raise UserError(f"{where} is not a picture that can be read: {_reason(error)}") from None


@contextmanager
def _silent() -> Generator[None]:
    """Within the block, standard error leads nowhere: libtiff prints what Pillow raises too."""
    with _SILENCING, ExitStack() as stack:
        with suppress(OSError):  # standard error may be closed
            before = os.dup(2)
            stack.callback(os.close, before)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            stack.callback(os.dup2, before, 2)
        yield


def _formats(names: Iterable[str] = FORMATS) -> list[str]:
    """Those of some formats that this Pillow has; no other format's module is loaded."""
    known: list[str] = []
    for name in dict.fromkeys(names):
        with suppress(ImportError):
            importlib.import_module(f"PIL.{'WebP' if name == 'WEBP' else name.title()}ImagePlugin")
        if name in Image.OPEN:
            known.append(name)
    return known


def _limit(image: ImageFile.ImageFile, where: str) -> None:
    """Refuse a large image before it is decoded. A large JPEG is decoded at half its size instead.

    A progressive JPEG is not: all of its coefficients are held at once, at any size.

    Raises:
        UserError: it has more than :data:`MOST_PIXELS`.
    """
    (width, height), most = image.size, _SMALLER.get(image.format or "", MOST_PIXELS)
    if width * height > MOST_PIXELS and image.format in ("JPEG", "MPO") and "progressive" not in image.info:
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > most:
        size = f"{width * height / 1e6:.0f} megapixels ({width} x {height})"
        raise UserError(f"{where} has {size}, and at most {most / 1e6:.0f} are read: make it smaller")


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image the right way up, bring it to 8 bits a channel and lay it on white: RGB.

    Raises:
        UserError: colours that are not followed, or pixels of a range that does not say what is white.
    """
    try:
        tags = getattr(image, "tag_v2", {})
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image, tags)
        if image.mode in _OPAQUE and "transparency" not in image.info:
            return image if image.mode == "RGB" else image.convert("RGB")
        if image.mode not in _CLEAR | _OPAQUE:
            raise ValueError(f"its colours are {image.mode}; save it as RGB")
        result = Image.new("RGB", image.size)
        for box in _boxes(image.size):
            part = image.crop(box)
            part = (part.convert("LA") if part.mode == "La" else part).convert("RGBA")
            result.paste(
                Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box
            )
        return result
    except (OSError, SyntaxError, ValueError) as error:  # a caller's image may not be decoded yet
        raise UserError(f"that picture cannot be used: {_reason(error)}") from None


def _boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """An image's parts, left, top, right, bottom: in these copies of four channels or floats stay small."""
    width, height = size
    for top in range(0, height, 1024):
        for left in range(0, width, 4096):
            yield left, top, min(left + 4096, width), min(top + 1024, height)


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Whole numbers of more than 8 bits, or floats, as ``L``, or ``LA`` where one value is transparent.

    Args:
        image: of a mode that is ``F`` or begins with ``I``.
        tags: of a TIFF, by their numbers.

    Raises:
        ValueError: see :func:`_white`.
    """
    bits = tags.get(_BITS, (16,))
    white = 4095 if image.mode != "F" and tuple(bits) == (12,) else _white(image)
    clear = image.info.get("transparency")
    result = Image.new("L" if clear is None else "LA", image.size)
    for box in _boxes(image.size):
        values = np.asarray(image.crop(box), np.float64)
        levels = np.clip(values * 255 / white, 0, 255).round()
        if tags.get(_PHOTOMETRIC) == 0:  # of a TIFF: 0 is white, which Pillow minds with 8 bits only
            levels = 255 - levels
        part = Image.fromarray(levels.astype(np.uint8))
        if clear is not None:
            part.putalpha(Image.fromarray(np.uint8(255) * (values != clear)))
        result.paste(part, box)
    return result


def _white(image: Image.Image) -> float:
    """The value that is white, where 0 is black.

    It is 65535 for whole numbers. For floats it is 1, or 255 where they are whole numbers of 8 bits.

    Raises:
        ValueError: the range of the values does not tell. Half a level beyond it is allowed, for filters.
    """
    parts = [np.asarray(image.crop(box)) for box in _boxes(image.size)]
    low, high = (float(bound) for bound in (min(p.min() for p in parts), max(p.max() for p in parts)))
    floats = image.mode == "F"
    if floats and -_HALF <= low and high <= 1 + _HALF:
        return 1
    if floats and low >= 0 and high <= 255 and all(np.array_equal(part, np.rint(part)) for part in parts):
        return 255
    # Whole numbers of 32 bits that 8 would hold may be meant as either.
    if not floats and (image.mode != "I" or high > 255 or high == 0) and low >= 0 and high <= 65535:
        return 65535
    kind = "floats" if floats else "whole numbers of 32 bits"
    raise ValueError(f"its pixels are {kind} from {low:g} to {high:g}; save it with 8 or 16 bits a channel")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Where nothing is to be turned, Pillow makes a copy.
            turned = image.getexif().get(_ORIENTATION) in range(2, 9)
            return ImageOps.exif_transpose(image) if turned else image
    except MemoryError:
        raise
    except Exception:  # broken metadata, which says nothing of which way is up
        return image


def center_crop_resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Crop the middle of a picture, laid on white, and scale it to ``size``.

    Returns:
        float32 ``[1, 3, h, w]`` in [-1, 1].
    """
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(to_rgb(image), size, Image.Resampling.LANCZOS), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]) / 127.5 - 1


def to_images(pixels: np.ndarray) -> list[Image.Image]:
    """``[B, 3, h, w]``, about [-1, 1] -> ``B`` Pillow images."""
    return from_levels(to_uint8(pixels))


NOT_FINITE = (
    "values that are NaN or infinite, so there is no image: its weights are broken, or too large for the "
    "precision that it runs in"
)


def finite(array: Array) -> bool:
    """Whether no number of a numpy array or torch tensor is NaN or infinite."""
    return bool((np.isfinite(array) if isinstance(array, np.ndarray) else array.isfinite()).all())


def to_uint8(pixels: Array) -> Array:
    """``[B, 3, h, w]``, about [-1, 1] -> whole numbers from 0 to 255, made where the pixels are.

    Raises:
        UserError: a pixel is NaN or infinite, which would become black or white.
    """
    if not finite(pixels):
        raise UserError(f"the decoder gave {NOT_FINITE}")
    return ((pixels + 1) * 127.5).round().clip(0, 255)


def from_levels(levels: np.ndarray) -> list[Image.Image]:
    """``[B, 3, h, w]`` of whole numbers from 0 to 255 -> ``B`` Pillow images."""
    return [Image.fromarray(level) for level in np.ascontiguousarray(levels.transpose(0, 2, 3, 1), np.uint8)]


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images, which are of one size, on one white sheet, as :func:`sheet_size` says."""
    columns = _columns(len(images))
    width, height = (side + _GAP for side in images[0].size)
    sheet = Image.new("RGB", sheet_size(len(images), images[0].size), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (_GAP + column * width, _GAP + row * height))
    return sheet


def sheet_size(number: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a sheet of ``number`` images, row by row, as square as their number allows."""
    columns = _columns(number)
    rows = math.ceil(number / columns)
    return columns * (size[0] + _GAP) + _GAP, rows * (size[1] + _GAP) + _GAP


def check_sheet(number: int, size: tuple[int, int], suffix: str) -> None:
    """Refuse a contact sheet that is too large to write or to read, before its images are made.

    Raises:
        UserError: it is.
    """
    width, height = sheet_size(number, size)
    if width * height > SHEET_PIXELS or max(width, height) > MOST_SIDE[SUFFIXES[suffix.lower()]]:
        raise UserError(f"a sheet of {width} x {height} pixels is too large for {suffix}: draw fewer images")


def _columns(number: int) -> int:
    return math.ceil(math.sqrt(number))


def format_of(path: Path) -> str:
    """The format that a path's suffix stands for.

    Raises:
        UserError: none that is written here.
    """
    if path.suffix.lower() not in SUFFIXES:
        *most, last = SUFFIXES
        raise UserError(f"images are written as {', '.join(most)} or {last}, not as {path.name[-40:]!r}")
    return SUFFIXES[path.suffix.lower()]


def encode(image: Image.Image, path: Path) -> bytes:
    """Encode an image with its records (:func:`fewstep.images.metadata.texts`) as the bytes of a file.

    PNG and WebP keep all pixels. JPEG has the quality :data:`JPEG_QUALITY` and full colour resolution;
    what is transparent becomes white in it.

    Args:
        image: in any mode of Pillow's.
        path: its suffix decides the format.

    Raises:
        UserError: another suffix, or an image that the format cannot hold.
    """
    kind = format_of(path)
    how: dict[str, Any] = {
        "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }.get(kind, {})
    pixels = image if image.mode in _MODES[kind] else to_rgb(image)
    data = io.BytesIO()
    try:
        pixels.save(data, kind, **how, **metadata.options(metadata.texts(image), kind))
    except (OSError, ValueError, SystemError, MemoryError) as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from None
    return data.getvalue()


def save(image: Image.Image, path: str | Path) -> None:
    """Write an image with its record, all of it or nothing. The suffix decides the format.

    Args:
        image: one of ours, or any other.
        path: ends in ``.png``, ``.jpg``, ``.jpeg`` or ``.webp``; see :func:`encode`. A link stays, and what
            it points at is written.

    Raises:
        UserError: another suffix, it cannot be written, or the arguments are no image and no path.
    """
    given: Any = image
    if not isinstance(given, Image.Image):
        raise UserError(f"save takes a Pillow image, not {type(given).__name__}")
    try:
        path = Path(path)
    except TypeError:
        raise UserError(f"save takes a path to write to, not {type(path).__name__}") from None
    atomic.write(path, encode(image, path))


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(read(path)).hexdigest()


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
