"""Reads diffusers folders part by part, so that errors name the part that is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import json_io
from fewstep.core.atomic import replacing_folder
from fewstep.core.types import UserError
from fewstep.core.validate import MANY, check_float, check_int
from fewstep.families import safetensors_reader, schedulers
from fewstep.families.config_check import (
    KnownClasses,
    check_class,
    check_config,
    check_tokenizer,
    check_weights,
    class_of,
    is_plain,
)

if TYPE_CHECKING:
    import torch

BF16_UNITS = ("amx_bf16", "avx512_bf16")
"""CPU features that multiply bf16 faster than fp32. Other CPUs emulate bf16, slower."""

FACTS = "fewstep.json"
"""Beside diffusers' own files: name, steps and guidance that the model wants."""


def name_of(path: Path) -> str:
    """Return the default name of a model: the name of its folder, or the stem of its file.

    A folder of the hub's cache is called after its model.
    """
    if path.is_file():
        return path.stem
    path = path.absolute() if path.name else path.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.name if path.name != ".." else path.resolve().name


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
    return json_io.read(path, dict[str, Any])


@dataclass(frozen=True)
class _Facts:
    """Checked fields of the file that :func:`write_facts` writes; all are optional."""

    name: str | None = None
    sampler: str | None = None
    t5: bool | None = None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what :func:`write_folder` wrote beside the parts; empty for a folder of another program.

    Raises:
        UserError: the file is there, but not a JSON object, or one of its facts is of another type.
    """
    path = folder / FACTS
    return checked_facts(read_json(path), path) if path.is_file() else {}


def checked_facts(facts: dict[str, Any], place: Path) -> dict[str, Any]:
    """``facts`` as they were read at ``place``.

    Raises:
        UserError: see :func:`read_facts`.
    """
    json_io.convert(facts, _Facts, str(place))
    facts = {name: fact for name, fact in facts.items() if fact is not None or name == "guidance"}
    try:
        if facts.get("steps") is not None:
            facts["steps"] = check_int("steps", facts["steps"], 1, MANY)
        if facts.get("guidance") is not None:
            facts["guidance"] = check_float("guidance", facts["guidance"], 0, 100)
        if facts.get("shift") is not None:
            facts["shift"] = check_float("shift", facts["shift"], 1e-3, 1e3)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return facts


def read_pipeline(folder: Path) -> tuple[str, dict[str, object]]:
    """The pipeline class that ``model_index.json`` names, and the whole index.

    Raises:
        UserError: not a diffusers folder.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers folder: model_index.json is missing")
    index = read_json(folder / "model_index.json")
    return str(index.get("_class_name"))[:80], index


def has_part(folder: Path, part: str) -> bool:
    """Whether ``model_index.json`` names a class for a part.

    Raises:
        UserError: not a diffusers folder.
    """
    _, index = read_pipeline(folder)
    entry = index.get(part)
    return isinstance(entry, list) and all(entry) and len(entry) == 2


def read_index(folder: Path, known: KnownClasses, required: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The parts that ``model_index.json`` names: ``{part: (library, class)}``, absent ones left out.

    Args:
        folder: a folder in diffusers' layout.
        known: pipeline and classes of its family.
        required: parts that must be there.

    Raises:
        UserError: not a diffusers folder, another pipeline's, an incomplete one, or a class in it cannot be
            its part.
    """
    kind, index = read_pipeline(folder)
    if not is_plain(kind, known.pipeline):
        raise UserError(f"{folder} holds a {kind}, but a {known.pipeline} is needed")
    named: dict[str, object] = {}
    for part, entry in index.items():
        items: list[object] = entry if isinstance(entry, list) else []
        if any(item is not None for item in items):
            named[part] = items
    where = str(folder / "model_index.json")
    parts: dict[str, tuple[str, str]] = json_io.convert(named, dict[str, tuple[str, str]], where)
    for part, entry in parts.items():
        check_class(entry, part, where, known)
    missing = [part for part in required if part not in parts]
    missing += [part for part in parts if part not in missing and not (folder / part).is_dir()]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{folder} is incomplete: {', '.join(missing)} {verb} missing")
    return parts


def read_parts(
    folder: Path,
    index: Mapping[str, tuple[str, str]],
    wanted: Iterable[str],
    known: KnownClasses,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The ``wanted`` parts of a folder's ``index``, nets in the torch ``dtype``.

    Raises:
        UserError: see :func:`read_part`.
    """
    no_net = ("tokenizer", "scheduler")
    return {
        part: read_part(folder, part, index[part], known, None if part.startswith(no_net) else dtype)
        for part in wanted
    }


def read_part(
    folder: Path, part: str, entry: tuple[str, str], known: KnownClasses, dtype: torch.dtype | None = None
) -> Any:
    """Load one part through its own class.

    Args:
        folder: the diffusers folder.
        part: name of the part, a folder inside.
        entry: ``(library, class)`` from the index.
        known: classes of the family.
        dtype: torch dtype of a net; ``None`` for tokenizers and schedulers.

    Raises:
        UserError: an unknown class, a file that is missing or broken, or weights of another net
            (:func:`fewstep.families.safetensors_match.resolve`).
    """
    _, name = entry
    where = folder / part
    if part == "scheduler":
        return schedulers.read(where, name).scheduler()
    kind = class_of(entry, part, str(folder / "model_index.json"), known)
    if hasattr(kind, "vocab_files_names"):
        _check_vocabulary(where, kind.vocab_files_names)
        check_tokenizer(where)
    elif (file := where / getattr(kind, "config_name", "config.json")).is_file():
        check_config(read_json(file), name, str(file), known.net_classes)
    try:
        if dtype is None:
            return kind.from_pretrained(where)
        check_weights(where, kind, read_json(where / "config.json"), _stored(where))
        return safetensors_reader.read_net(kind, where, dtype)
    except UserError:
        raise
    except BaseException as error:  # of two libraries that believe what they read; a panic of a third
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"cannot load {where}: {first_line(error)}") from error


def _stored(folder: Path) -> int:
    """Bytes of a part's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _check_vocabulary(folder: Path, files: dict[str, str]) -> None:
    """Transformers makes an empty tokenizer of a folder without vocabulary; here that is an error."""
    slow = [name for kind, name in files.items() if kind != "tokenizer_file"]
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in slow):
        raise UserError(
            f"{folder} has no vocabulary: tokenizer.json is missing, and so is {' or '.join(slow)}"
        )


def check_place(target: Path) -> None:
    """Refuse a place where something else than a diffusers folder lies.

    Raises:
        UserError: there does.
    """
    if target.exists() and not ((target / "model_index.json").is_file() or _is_empty(target)):
        raise UserError(f"{target} exists and is no diffusers folder; choose another place")


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def write_folder(
    parts: Mapping[str, Any], folder: str | Path, pipeline: Any, facts: Mapping[str, object]
) -> None:
    """Write a diffusers folder with ``facts`` beside, whole or not at all; an earlier one there is replaced.

    Args:
        parts: the components by their diffusers names.
        folder: where.
        pipeline: the pipeline class that writes them.
        facts: what :func:`read_facts` gives back.

    Raises:
        UserError: something else is in the way, or the disk refuses.
    """
    target = Path(folder)
    check_place(target)
    try:
        with replacing_folder(target) as fresh:
            pipeline(**parts).save_pretrained(fresh)
            write_facts(facts, fresh)
    except Exception as error:  # safetensors has an error of its own for a full disk
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UserError(f"cannot write {target}: {first_line(error)}") from error
        raise


def write_facts(facts: Mapping[str, object], folder: Path) -> None:
    """Write what :func:`read_facts` gives back."""
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def fetch(name: str, pipeline: Any, without: Mapping[str, None] | None = None) -> Path:
    """Fetch a hub model through a pipeline class of diffusers, or take it from its cache.

    Args:
        name: the hub name.
        pipeline: the class.
        without: parts to leave there, each with ``None``.

    Raises:
        UserError: neither a path nor a hub name, or the hub cannot be reached and nothing is cached.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"{name} is neither a folder nor a file here, nor a hub name like owner/model")
    try:
        return Path(pipeline.download(name, **(without or {})))
    except (OSError, ValueError) as error:
        what = f"no folder {name} here, and the hub did not give it"
        raise UserError(f"{what}; check the name, the network and your access") from error


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name.

    Raises:
        UserError: none that nets run in here.
    """
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be float32, bfloat16 or float16, not {name}")
    return getattr(torch, name)


def check_device(name: str) -> None:
    """Refuse a torch device that is not there.

    Raises:
        UserError: it is not.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {first_line(error)}") from error


def prefers_bf16(device: str) -> bool:
    """Whether nets are faster in bf16 than in fp32 there: on any GPU, and on a CPU with units for it."""
    import torch

    capable = torch.cpu.get_capabilities()
    return device != "cpu" or any(capable.get(unit, False) for unit in BF16_UNITS)
