"""Make images again from their metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import UserError
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.images.io import file_hash
from fewstep.pipeline.resolve import builtin_models

if TYPE_CHECKING:
    from fewstep.images.record import Record
    from fewstep.inference.options import TorchOptions


class ModelWarning(UserWarning):
    """An image is made again with another model than the first time."""


def batch_size(record: Record) -> int:
    """Return the batch size with which an image was made.

    Raises:
        UserError: the number is out of range.
    """
    return check_int("batch", record.batch, 1, MOST_AT_ONCE)


def restore_request(
    record: Record, given: Mapping[str, object], prompts: list[str], model: str | None
) -> tuple[dict[str, Any], list[str], str | None]:
    """Return options, prompts and model of an image, where those that are given now take precedence.

    Raises:
        UserError: the model must be named, or the input image is missing or has changed.
    """
    if model is None and not _is_local(record.model):
        # An image of unknown origin must not choose what is downloaded or imported.
        raise UserError(f"that image was made by {record.model}: say so with --model {record.model}")
    options: dict[str, Any] = {
        name: getattr(record, name)
        for name in ("seed", "steps", "guidance", "negative", "image", "strength")
        if getattr(record, name) is not None
    }
    if "image" in options and "image" not in given:
        path = options["image"]
        if not path:
            raise UserError("its input image was no file: give it with --image")
        if not Path(path).is_file() or file_hash(path) != record.image_sha256:
            raise UserError(f"its input image {path} is gone or has changed: give it with --image")
    return {**options, **given}, prompts or [record.prompt], record.model if model is None else model


def _is_local(name: str) -> bool:
    """Return whether a recorded model is here, without a family from outside the package in front."""
    from fewstep.families.registry import built_in

    if Path(name).exists() or name in [path.name for path in builtin_models()]:
        return True
    family, _, folder = name.partition(":")
    return family in built_in() and Path(folder).exists()


def restore_torch_options(record: Record, options: TorchOptions, model: str | None) -> TorchOptions:
    """Return the options of the PyTorch model of an image, where those that are given take precedence.

    For another model ``options`` are returned as they are.
    """
    if model not in (None, record.model):
        return options
    if record.lora and not options.lora:
        options = replace(options, lora=record.lora)
    if record.bits is None:
        return options
    recorded: dict[str, Any] = {
        "bits": record.bits, "student": record.student, "tiny_decoder": record.tiny_decoder,
        "size": f"{record.size[0]}x{record.size[1]}",
    }  # fmt: skip
    return replace(
        options, **{name: value for name, value in recorded.items() if getattr(options, name) is None}
    )


def prompts_of(records: Sequence[Record]) -> tuple[list[str], int]:
    """Return the prompts of an image or an image grid, and the number of images per prompt.

    Args:
        records: of its images, in order.

    Raises:
        UserError: the images are not those of one call.
    """
    first = records[0]
    number = next((at for at, record in enumerate(records) if at and record.seed == first.seed), len(records))
    prompts = [record.prompt for record in records[::number]]
    jobs = [(prompt, first.seed + index) for prompt in prompts for index in range(number)]
    alike = {replace(record, prompt="", seed=0, batch=1) for record in records}
    if len(alike) > 1 or jobs != [(record.prompt, record.seed) for record in records]:
        raise UserError("the images of that sheet were not made by one call, so one cannot make them again")
    return prompts, number
