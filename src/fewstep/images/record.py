"""The record of how an image was made, and reading it from an image's metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.core.types import UserError
from fewstep.images import metadata
from fewstep.images.decode import opened
from fewstep.images.io import SUFFIXES, read
from fewstep.images.metadata import CHUNK, PARAMETERS

SHEET = "sheet"
"""The single field of a contact sheet's metadata: the list of its images' records."""
_NEGATIVE = "Negative prompt:"


class RecordWarning(UserWarning):
    """A record has fields that this version does not know."""


@dataclass(frozen=True)
class Record:
    """How an image was made: enough to make it again.

    Attributes:
        prompt: the prompt, style included.
        seed: of this image.
        steps: number of steps.
        model: the model as the user named it (name, folder or hub name).
        hash: the bundle's digest; empty for a PyTorch model.
        size: width and height in pixels.
        guidance: guidance scale; ``None`` when it is distilled into the model.
        negative: negative prompt, if any.
        image: path of the input image, if any.
        image_sha256: the hash of that file; empty when it came as a Pillow image.
        strength: strength of image-to-image, with an input image only.
        batch: number of images in one batch of the net. Rounding depends on it.
        bits: precision of the net's weights, for an offloaded PyTorch model.
        student: the student whose weights replaced the model's, if any.
        lora: LoRAs that were added to the model, ``FILE:WEIGHT`` each, if any.
        tiny_decoder: the tiny autoencoder that decoded instead of the model's own, if any.
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
        """Return the record as JSON, one line of ASCII."""
        facts = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(facts)

    @classmethod
    def parse(cls, text: str, where: str = "that record") -> Record:
        """Read the record that :meth:`json` wrote. Unknown fields are ignored.

        Raises:
            UserError: it has another shape; ``where`` names it.
        """
        return cls.of(read_json(text, where), where)

    @classmethod
    def of(cls, facts: object, where: str) -> Record:
        """Read the record from the dictionary ``facts``.

        Raises:
            UserError: it has another shape; ``where`` names it.
        """
        from fewstep.core import json_io

        return json_io.convert(facts, cls, where)

    def parameters(self) -> str:
        """Return the text that AUTOMATIC1111's web UI and its readers understand.

        A value that would be read as several is quoted as the web UI does it. A prompt that begins like the
        line of the negative prompt gets a small letter there.
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
        """Put the record into ``image.info``, where :func:`fewstep.images.io.save` finds it."""
        image.info.update({PARAMETERS: self.parameters(), CHUNK: self.json()})
        return image


def _quoted(value: str) -> str:
    """Return a value of the ``parameters``, as a JSON string if a reader would not see exactly one value."""
    if value == value.strip() and not any(sign in value for sign in ',:"\n\r'):
        return value
    return json.dumps(value, ensure_ascii=False)


def read_json(text: str, where: str) -> dict[str, Any]:
    """Read the JSON object in the text ``fewstep`` of an image.

    Raises:
        UserError: it is no JSON object, or nested too deeply; ``where`` names it.
    """
    from fewstep.core import json_io

    try:
        # Not msgspec: it refuses paths that are not UTF-8, which Record.json keeps.
        facts = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise UserError(f"the metadata of {where} is damaged") from None
    return json_io.convert(facts, dict[str, Any], f"the metadata of {where}")


def _finite(text: str) -> float:
    """Read a JSON number. Python would also read ``NaN`` and ``Infinity``, which JSON does not have."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def read_records(path: str | Path) -> list[Record]:
    """Read the record of an image that fewstep made, or those of all images on a contact sheet.

    A :class:`RecordWarning` names fields that this version does not know.

    Raises:
        UserError: the image cannot be read, fewstep did not make it, or its metadata is damaged.
    """
    text = read_info(path).get(CHUNK)
    if text is None:
        raise UserError(f"{path} was not made by fewstep, or has lost its metadata")
    facts = read_json(text, str(path))
    return records_of(facts, str(path))


def records_of(facts: Mapping[str, object], where: str) -> list[Record]:
    """Return the records in the metadata of an image, as :func:`read_records` does.

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


def read_info(path: str | Path) -> dict[str, str]:
    """Read the texts ``parameters`` and ``fewstep`` from an image file, without decoding its pixels.

    Raises:
        UserError: the file is no image of a format that is written here.
    """
    with opened(read(path), str(path), tuple(dict.fromkeys(SUFFIXES.values()))) as image:
        return metadata.texts(image)
