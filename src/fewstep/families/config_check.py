"""Checks of a downloaded model folder, made before diffusers and transformers act on it.

Both libraries trust a configuration. They create as many layers and as large tables as it says, and fail far
from the file where a value has another type. Each configuration that is read here has a declared shape with
limits (:mod:`fewstep.families.net_classes`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.net_classes import SHARED_CLASSES, CLIPConfig, NetClass, T5Config

if TYPE_CHECKING:
    from torch.nn import Module

OMITTED_FIELDS = ("vocab_size", "max_position_embeddings")
"""Fields of a text encoder's configuration that are read and that its file may omit."""
WEIGHT_SLACK = 2**20
"""Weights that a configuration may declare beyond :data:`WEIGHT_RATIO` times as many as its files hold."""
WEIGHT_RATIO = 2
"""Two, because a table that two parts of a net share is stored once, under either name."""

LIBRARIES = ("diffusers", "transformers")
"""The only modules that are imported because a file names them: importing another would run its code."""


class KnownClasses(Protocol):
    """The classes that a family's nets can be; every :class:`~fewstep.families.base.Architecture` is one.

    Attributes:
        pipeline: name of the family's text-to-image pipeline class.
        nets: part -> the names of classes that it can be.
        net_classes: name -> class of net.
    """

    @property
    def pipeline(self) -> str: ...
    @property
    def nets(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def net_classes(self) -> Mapping[str, NetClass]: ...


def is_plain(class_name: str, pipeline: str) -> bool:
    """Return whether a pipeline class makes the same images of a text as a family's own pipeline.

    The image-to-image and inpainting pipelines share all parts and the sampling. Any other has more in it.

    Args:
        class_name: name of the class.
        pipeline: name of the family's text-to-image pipeline.
    """
    stem = pipeline.removesuffix("Pipeline")
    return class_name in (pipeline, f"{stem}Img2ImgPipeline", f"{stem}InpaintPipeline")


def check_class(entry: tuple[str, str], part: str, where: str, known: KnownClasses) -> None:
    """Refuse a class that cannot be that part of a model, by its name alone: nothing is imported.

    Args:
        entry: library and class, as the index says.
        part: diffusers name of the part, such as ``text_encoder_2``.
        where: name of the index in errors.
        known: classes of the family.

    Raises:
        UserError: the class cannot be that part, or its library is not one of :data:`LIBRARIES`.
    """
    library, name = entry
    own = known.net_classes.get(name)
    if library not in LIBRARIES and (own is None or own.load is None):
        raise UserError(
            f"{where} names a class of {library[:80] or 'no library'} for {part}: "
            "only diffusers and transformers are known"
        )
    stem = part.rstrip("_123")
    if part in known.nets:
        fits = name in known.nets[part]
    elif stem in {each.part for each in known.net_classes.values()}:
        fits = own is not None and own.part == stem
    else:  # a tokenizer or a scheduler, or a part that is never loaded
        fits = name.isidentifier()
    if not fits:
        raise UserError(
            f"{where} names {name[:80] or 'no class'} for {part} of a {known.pipeline}, which cannot be one"
        )


def class_of(entry: tuple[str, str], part: str, where: str, known: KnownClasses) -> Any:
    """Return the class of a part. No other function imports a library because a file names it.

    Args:
        entry: library and class, as the index says.
        part: diffusers name of the part.
        where: name of the index in errors.
        known: classes of the family.

    Raises:
        UserError: see :func:`check_class`; or the library has no such class.
    """
    check_class(entry, part, where, known)
    library, name = entry
    own = known.net_classes.get(name)
    if own is not None and own.load is not None:
        return own.load()
    try:
        found = getattr(importlib.import_module(library), name, None)
    except Exception:  # one of the library's modules needs what is not installed
        found = None
    if found is None:
        raise UserError(
            f"{where} names {library}.{name[:80]} for {part}, which the installed {library} does not have"
        )
    tokenizer = part.rstrip("_123") == "tokenizer"
    if tokenizer != hasattr(found, "vocab_files_names") or not (tokenizer or own is not None):
        raise UserError(f"{where} names {name[:80]} for {part}, which cannot be one")
    return found


def check_config(
    config: Mapping[str, object],
    name: str | None,
    where: str,
    classes: Mapping[str, NetClass] = SHARED_CLASSES,
) -> None:
    """Refuse a configuration with fields of another type than its class reads, or numbers beyond the limits.

    Args:
        config: the parsed JSON.
        name: name of the class; a class that is not in ``classes`` is not checked.
        where: name of the file in errors.
        classes: name -> class of net.

    Raises:
        UserError: the configuration is not valid.
    """
    if name is not None and name in classes:
        json_io.convert(config, classes[name].config, where)


def with_defaults(
    config: Mapping[str, object], name: str | None, classes: Mapping[str, NetClass] = SHARED_CLASSES
) -> dict[str, Any]:
    """Return a net's configuration with the fields that transformers omits where they have the default.

    Args:
        config: the parsed JSON.
        name: name of the class.
        classes: name -> class of net.
    """
    shape = classes[name].config if name is not None and name in classes else None
    is_text = shape in (CLIPConfig, T5Config)
    defaults = {key: getattr(shape, key) for key in OMITTED_FIELDS if is_text and hasattr(shape, key)}
    return defaults | dict(config)


@dataclass(frozen=True)
class _AddedToken:
    content: Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True)
class _TokenizerConfig:
    model_max_length: Annotated[int, Meta(ge=1)] | Annotated[float, Meta(ge=1)] = 512
    added_tokens_decoder: dict[Annotated[int, Meta(ge=0, lt=2**24)], _AddedToken] = field(
        default_factory=dict[int, _AddedToken]
    )


def tokenizer_max_length(folder: Path) -> float:
    """Return the ``model_max_length`` of a tokenizer's folder; some state a huge number for "no limit".

    Raises:
        UserError: the tokenizer's configuration is not valid.
    """
    path = folder / "tokenizer_config.json"
    config = json_io.read(path, _TokenizerConfig) if path.is_file() else _TokenizerConfig()
    return config.model_max_length


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer's folder whose files the libraries cannot take.

    Raises:
        UserError: a file is not valid, or has numbers beyond the limits.
    """
    from fewstep.runtime.tokenizer_check import Identifier, check

    if (path := folder / "tokenizer_config.json").exists():
        json_io.read(path, _TokenizerConfig)
    if (path := folder / "tokenizer.json").exists():
        check(path)
    for name in ("vocab.json", "added_tokens.json"):
        if (path := folder / name).exists():
            json_io.read(path, dict[str, Identifier])


def check_weights(folder: Path, net_class: Any, config: Mapping[str, object], stored: int) -> None:
    """Refuse a net whose configuration declares far more weights than its files hold.

    Args:
        folder: folder of the part, for errors.
        net_class: class of the net.
        config: configuration of the net.
        stored: upper bound of the numbers in its files.

    Raises:
        UserError: the configuration does.
    """
    import torch

    with torch.device("meta"):  # shapes without memory
        net = make_net(net_class, config)
    declared = sum(tensor.numel() for tensor in net.state_dict().values())
    if declared > WEIGHT_RATIO * stored + WEIGHT_SLACK:
        raise UserError(
            f"{folder} declares {declared} weights in its configuration, and its files hold {stored}"
        )


def make_net(net_class: Any, config: Mapping[str, object]) -> Module:
    """Return a net of a class of diffusers (which has ``from_config``) or of transformers, not initialized
    from any file."""
    if hasattr(net_class, "load_config"):
        return net_class.from_config(dict(config))
    return net_class(net_class.config_class(**config))
