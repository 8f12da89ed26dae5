"""Pictures (floor 2): pixels and arrays, what a PNG says of how it was made, safe writing."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fewstep import files
from fewstep.types import Array, UserError

Image.preinit()  # Pillow does this at the first save; here it runs while the model loads

CHUNK = "fewstep"
"""Our own text chunk: one JSON object."""
PARAMETERS = "parameters"
"""The text chunk of AUTOMATIC1111's web UI, which most viewers of generated pictures read."""


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
    def parse(cls, text: str) -> Record:
        """The record that :meth:`json` wrote.

        Raises:
            ValueError: it is none of this version.
        """
        try:
            facts: Any = json.loads(text)
            width, height = facts.pop("size")
            if facts.get("lora") is not None:
                facts["lora"] = tuple(facts["lora"])
            made = cls(size=(width, height), **facts)
            texts = (made.prompt, made.model, made.hash, made.version, *(made.lora or ()))
            maybe = (made.negative, made.image, made.image_sha256, made.student, made.tiny_decoder)
            if not all(type(text) is str for text in texts + tuple(t for t in maybe if t is not None)):
                raise TypeError("text expected")
            bits = 32 if made.bits is None else made.bits
            if not all(type(n) is int for n in (width, height, made.seed, made.steps, made.batch, bits)):
                raise TypeError("a whole number expected")
            if not all(type(n) in (int, float, type(None)) for n in (made.guidance, made.strength)):
                raise TypeError("a number expected")
            return made
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None

    def parameters(self) -> str:
        """The text of the ``parameters`` chunk."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
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
        told = {name: value for name, value in facts.items() if value not in (None, "")}
        lines.append(", ".join(f"{name}: {value}" for name, value in told.items()))
        return "\n".join(lines)

    def stamp(self, image: Image.Image) -> Image.Image:
        """Put the record into ``image.info``, under the names of its PNG chunks."""
        image.info.update({PARAMETERS: self.parameters(), CHUNK: self.json()})
        return image


def read_record(path: str | Path) -> Record:
    """The record of one of our pictures.

    Raises:
        UserError: no readable picture, or none of ours.
    """
    text = read_info(path).get(CHUNK)
    if text is None:
        raise UserError(f"{path} was not made by fewstep, or has lost its metadata")
    try:
        return Record.parse(text)
    except ValueError:
        raise UserError(f"{path} is not a single picture of this version of fewstep") from None


def read_info(path: str | Path) -> dict[str, str]:
    """The text chunks of a picture that we write or others know: ``parameters`` and ``fewstep``.

    Raises:
        UserError: no readable picture.
    """
    info = open_image(path).info
    return {name: str(info[name]) for name in (PARAMETERS, CHUNK) if name in info}


def open_image(path: str | Path) -> Image.Image:
    """Open and decode a picture file.

    Raises:
        UserError: it cannot be read, is no picture, or is cut short.
    """
    return decode(read(path), str(path))


def read(path: str | Path) -> bytes:
    """A picture's file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a picture that can be read: {_reason(error)}") from None


def decode(data: bytes, where: str) -> Image.Image:
    """Decode a picture file; ``where`` names it in errors.

    Raises:
        UserError: it is no picture, too large a one, or cut short.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd metadata
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return image
    except UnidentifiedImageError:
        raise UserError(f"{where} is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a picture that can be read: {_reason(error)}") from None


def flat(image: Image.Image) -> Image.Image:
    """Turn a picture the right way up, bring it to 8 bits a channel and lay it on white: RGB.

    Raises:
        UserError: pixels of a kind that Pillow cannot turn into RGB.
    """
    try:
        image = _upright(image)
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
            levels = np.clip(np.asarray(image, np.float64) / 257, 0, 255)
            image = Image.fromarray(levels.round().astype(np.uint8))
        image = image.convert("RGBA")
    except ValueError as error:
        raise UserError(f"that picture cannot be used: {_reason(error)}") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image)
    except (SyntaxError, OSError, KeyError):
        return image  # broken metadata says nothing of which way is up


def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Crop the middle of a picture, laid on white, and scale it to ``size``.

    Returns:
        float32 ``[1, 3, h, w]`` in [-1, 1].
    """
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(flat(image), size, Image.Resampling.LANCZOS), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]) / 127.5 - 1


def to_images(pixels: np.ndarray) -> list[Image.Image]:
    """``[B, 3, h, w]``, about [-1, 1] -> ``B`` Pillow images."""
    return from_levels(levels(pixels))


def levels(pixels: Array) -> Array:
    """``[B, 3, h, w]``, about [-1, 1] -> whole numbers from 0 to 255, made where the pixels are."""
    return ((pixels + 1) * 127.5).round().clip(0, 255)


def from_levels(levels: np.ndarray) -> list[Image.Image]:
    """``[B, 3, h, w]`` of whole numbers from 0 to 255 -> ``B`` Pillow images."""
    return [Image.fromarray(level) for level in np.ascontiguousarray(levels.transpose(0, 2, 3, 1), np.uint8)]


def contact_sheet(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """All pictures on one white sheet, row by row, as square as their number allows."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (side + gap for side in images[0].size)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * width, gap + row * height))
    return sheet


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG with its metadata, all of it or nothing: a file beside it is renamed when complete.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for name in (PARAMETERS, CHUNK):
        if name in image.info:
            chunks.add_text(name, image.info[name])
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=chunks)
    files.write(path, data.getbuffer())


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(read(path)).hexdigest()


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
