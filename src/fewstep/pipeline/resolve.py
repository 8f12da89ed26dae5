"""Finds models by name: one that ships with fewstep, a folder, a file, or a hub name."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.run_folder import RUN, unfinished
from fewstep.core.types import UserError

if TYPE_CHECKING:
    from fewstep.runtime.bundle import Bundle

INDEXES = ("bundle.json", "model_index.json")
"""Files that make a folder a model: a bundle's manifest, or diffusers' index."""

LORA = "pytorch_lora_weights.safetensors"
"""Weights file in the subfolder ``lora`` of a run."""

DEFAULT = "pocket"
"""Name of the default model."""
SHIPPED = Path(__file__).parents[1] / "models"
"""Folder of the models that are installed with fewstep."""
SHIPS = ["*.json", "*.onnx", "*.data", "*.xml", "*.bin", "*.pte", "LICENSE*", "README.md"]
"""Files of a bundle on the hub; other files of the repository are not fetched."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ShippedWarning(UserWarning):
    """A name is both a model that ships with fewstep and a folder."""


def parse_family(name: str) -> tuple[str | None, str]:
    """Split ``FAMILY:NAME`` (:func:`fewstep.families.registry.parse_family`); most names have no family."""
    if ":" not in name:
        return None, name
    from fewstep.families import registry

    return registry.parse_family(name)


def is_bundle(name: str | None) -> bool:
    """Return whether a name is that of a local bundle. The hub is not asked."""
    plain = DEFAULT if name is None else parse_family(name)[1]
    shipping = plain in (folder.name for folder in builtin_models())
    return shipping or any(os.path.isfile(f"{plain}/{part}bundle.json") for part in ("", "model/"))


def builtin_models() -> list[Path]:
    """Return the folders of the bundles that are installed with fewstep."""
    return sorted(path.parent for path in SHIPPED.glob("*/bundle.json"))


def resolve(name: str) -> Path:
    """Return the folder or file of a model; for the folder of a run its model.

    A bundle on the hub is fetched into the hub's cache.

    Raises:
        UserError: there is no such model, or the run has not finished.
    """
    path = Path(name)
    if len(name) > 4096 or any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        raise UserError(f"there is no model of such a name: {name[:40]}…")
    if name in (names := [folder.name for folder in builtin_models()]):
        if os.path.isdir(name):
            text = f"{name} is the model that ships with fewstep; for the folder here say ./{name}"
            warnings.warn(text, ShippedWarning, stacklevel=2)
        return SHIPPED / name
    if os.path.isdir(name):  # unlike Path.is_dir it raises for no name
        return _model_in(path)
    if os.path.isfile(name) and path.suffix == ".safetensors":
        return path
    if not os.path.exists(name) and _HUB_NAME.fullmatch(name):
        return _fetch(name)
    have = ", ".join(names) or "none are installed"
    raise UserError(f"there is no model {name!r}: give a folder, a hub name (org/name) or one of: {have}")


def _model_in(folder: Path) -> Path:
    """Return the folder itself if it is a model, or the model of the run in it.

    Raises:
        UserError: there is no model. The message says what the folder is instead.
    """
    for place in (folder, folder / "model"):
        if _is_model(place):
            return place
    if (why := unfinished(folder)) is not None:
        raise UserError(why)
    if (folder / "lora" / LORA).is_file() or (folder / LORA).is_file():
        raise UserError(f"{folder} holds a LoRA alone: give its base with --model, and it with --student")
    if (folder / RUN).is_file() and (folder / "model").is_dir():
        raise UserError(f"{folder} is a run that trained a part of a model: no model_index.json in its model")
    if models := sorted(place.name for place in folder.iterdir() if _is_model(place)):
        raise UserError(f"{folder} holds several models: give one, such as {folder / models[0]}")
    raise UserError(f"{folder} is no model: it has neither bundle.json nor model_index.json")


def _is_model(folder: Path) -> bool:
    return any((folder / index).is_file() for index in INDEXES)


def bundle_of(source: str) -> Bundle | None:
    """Read the bundle of a source; ``None`` for a PyTorch model.

    Raises:
        UserError: there is no such model, or the bundle is damaged.
    """
    return read_bundle(resolve(parse_family(source)[1]))


def read_bundle(path: Path, suffixes: Mapping[str, Sequence[str]] | None = None) -> Bundle | None:
    """Read the description of a bundle; ``None`` for any other model.

    Args:
        path: a folder or file.
        suffixes: endings of a graph's files by engine, with those of an engine from outside.

    Raises:
        UserError: the bundle is damaged, or for an unknown engine.
    """
    if not (path / "bundle.json").is_file():
        return None
    from fewstep.runtime.bundle import SUFFIXES, read

    return read(path, suffixes or SUFFIXES)


def _fetch(name: str) -> Path:
    """Return the folder of a bundle on the hub. A family's own loader fetches a diffusers pipeline.

    A bundle in the cache is used as it is, so that generation needs no network.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    known = try_to_load_from_cache(name, "bundle.json")
    if isinstance(known, str) and _complete(Path(known).parent):
        return Path(known).parent
    try:
        files = {file.rfilename for file in HfApi().model_info(name).siblings or ()}
        if "bundle.json" in files:
            return Path(snapshot_download(name, allow_patterns=SHIPS))
    except Exception as error:
        raise unreachable(name, error) from None
    if "model_index.json" not in files:
        raise UserError(f"{name} on the hub is no model for fewstep: no bundle.json, no model_index.json")
    return Path(name)


def unreachable(name: str, error: Exception) -> UserError:
    """Return the error for any exception of the hub's client, which come from several network libraries."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"there is no folder {name}, and the hub cannot be asked for it: {reason}")


def _complete(folder: Path) -> bool:
    """Return whether a cached bundle has all its files."""
    from fewstep.runtime.bundle import read

    try:
        read(folder)
    except UserError:  # an interrupted fetch: fetch the rest
        return False
    return True
