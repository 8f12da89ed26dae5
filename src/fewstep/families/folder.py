"""Diffusers folders, read part by part, so that what is missing can be named (floor 2)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.types import UserError

T5 = ("tokenizer_3", "text_encoder_3")
"""The parts of SD3 that may be absent."""


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return data


def read_index(folder: Path, pipeline: str, required: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The parts that ``model_index.json`` names: ``{part: (library, class)}``, absent ones left out.

    Args:
        folder: a folder in diffusers' layout.
        pipeline: what the name of its pipeline class must begin with.
        required: parts that must be there.

    Raises:
        UserError: not a diffusers folder, another pipeline's, or an incomplete one.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers folder: model_index.json is missing")
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith(pipeline):
        raise UserError(f"{folder} holds a {kind}, but a {pipeline}Pipeline is needed")
    named = {part: tuple(entry) for part, entry in index.items() if isinstance(entry, list)}
    parts = {part: entry for part, entry in named.items() if len(entry) == 2 and all(entry)}
    missing = [part for part in required if part not in parts]
    missing += [part for part in parts if part not in missing and not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder} is incomplete: {', '.join(missing)} is missing")
    return parts


def read_part(folder: Path, part: str, entry: tuple[str, str], dtype: Any = None) -> Any:
    """Load one part through its own class.

    Args:
        folder: the diffusers folder.
        part: name of the part, a folder inside.
        entry: ``(library, class)`` from the index.
        dtype: torch dtype of a net; ``None`` for tokenizers and schedulers.

    Raises:
        UserError: an unknown class, a file that is missing or broken, or weights that lack a tensor.
    """
    library, name = entry
    if library not in ("diffusers", "transformers"):
        raise UserError(
            f"{folder} names a class of {library} for {part}: only diffusers and transformers are known"
        )
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise UserError(
            f"{folder} names {library}.{name} for {part}, which the installed {library} does not have"
        )
    if hasattr(kind, "vocab_files_names"):
        _check_vocabulary(folder / part, kind.vocab_files_names)
    try:
        if dtype is None:
            return kind.from_pretrained(folder / part)
        net, report = kind.from_pretrained(folder / part, torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"cannot load {folder / part}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(f"{folder / part} lacks weights, among them {sorted(report['missing_keys'])[0]}")
    return net


def _check_vocabulary(folder: Path, files: dict[str, str]) -> None:
    """Transformers makes an empty tokenizer of a folder without vocabulary; here that is an error."""
    slow = [name for kind, name in files.items() if kind != "tokenizer_file"]
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in slow):
        raise UserError(
            f"{folder} has no vocabulary: tokenizer.json is missing, and so is {' or '.join(slow)}"
        )
