"""Loads models for generation, training and export (names: :mod:`fewstep.pipeline.resolve`)."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.optional import missing_extra, need
from fewstep.core.types import UserError
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.pipeline.params import check_known
from fewstep.pipeline.resolve import DEFAULT, parse_family, read_bundle, resolve, unreachable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    from fewstep.families.base import Architecture, Family
    from fewstep.inference.options import TorchOptions, TorchOptionsDict
    from fewstep.pipeline.pipeline import Pipeline
    from fewstep.runtime.bundle import Bundle
    from fewstep.runtime.engine import RuntimeEngine


Backend = Literal["onnx", "openvino", "executorch", "torch"]
"""The built-in backends."""
NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn of unused kernels as soon as diffusers finds torchao."""

PLAIN: dict[str, Any] = {"device": "cpu", "bits": 32}
"""Default options of a PyTorch model."""


def load(
    source: str | Path | None = None,
    backend: str | None = None,
    threads: int | None = None,
    **options: Unpack[TorchOptionsDict],
) -> Pipeline:
    """Load a model for generation.

    Args:
        source: name of a model that ships with fewstep (``None``: ``pocket``); a folder with a bundle or a
            diffusers pipeline; the folder of a finished run; a single-file ``.safetensors`` checkpoint; or a
            hub name, ``org/name``. With ``FAMILY:`` in front it must be a PyTorch model of that family:
            ``sd3``, ``flux``, or the import path of a module that has an ``ARCHITECTURE``.
        backend: ``onnx``, ``openvino`` or ``executorch`` requires a bundle for that engine, ``torch`` a
            PyTorch model. The import path or entry point of a runtime engine
            (:mod:`fewstep.runtime.engine`) opens the bundle with that engine. The model's own by default.
        threads: processor threads; all cores by default.
        options: how a PyTorch model runs: ``student``, ``lora`` (``FILE[:WEIGHT]``, or several),
            ``memory``, ``bits``, ``tiny_decoder``, ``size``, ``device``, ``compile``. ``batch`` and ``image``
            are what memory is planned for (:class:`fewstep.inference.options.TorchOptions`). Without any of
            them but ``lora`` the model runs in float32 on the CPU, as in benchmarks.

    Raises:
        UserError: there is no such model, it is damaged, a library is missing, or the model does not fit.
    """
    threads = None if threads is None else counted_threads(threads, 1)
    name = DEFAULT if source is None else _name(source)
    family, plain = parse_family(name)
    engine = _external_engine(backend)
    path = resolve(plain)
    bundle = read_bundle(path, _suffixes(engine))
    kind = "torch" if bundle is None else bundle.engine
    wanted = backend if engine is None else engine.FORMAT
    if wanted not in (None, kind):
        raise UserError(f"model {name} runs on {kind}, not on {wanted}: {_hint(name, kind, wanted)}")
    given = _torch_options(options) if options else None
    if bundle is None:
        return _load_torch(name, path, threads, given, family)
    unused = [*([f"{family}:"] if family is not None else []), *(given.named() if given is not None else [])]
    if unused:
        raise UserError(f"model {plain} is a bundle, and {unused[0]} is for PyTorch models: leave it out")
    return _load_bundle(name, bundle, threads, engine)


def _external_engine(backend: str | None) -> RuntimeEngine | None:
    """Import a runtime engine from outside the package; ``None`` for a built-in backend."""
    if backend is None or backend in get_args(Backend):
        return None
    from fewstep.runtime.engine import external

    return external(str(backend))


def _suffixes(engine: RuntimeEngine | None) -> Mapping[str, Sequence[str]] | None:
    """Return the endings of graph files by engine, if there is an engine from outside."""
    if engine is None:
        return None
    from fewstep.runtime.bundle import SUFFIXES

    return {engine.FORMAT: engine.SUFFIXES, **SUFFIXES}


def _name(source: object) -> str:
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str):
        raise UserError(f"a model is named by a string or a path, not {type(source).__name__}")
    return name


def _hint(name: str, kind: str, wanted: str | None) -> str:
    """Return what to do about a model for another backend than the wanted one."""
    if wanted == "torch":
        return "give a diffusers folder"
    if (kind, wanted) == ("onnx", "openvino"):
        return f"`fewstep export {name} --to openvino` makes a bundle of it"
    if wanted in get_args(Backend):
        return f"`fewstep export --to {wanted}` makes a bundle of a diffusers folder"
    return "give a bundle for that engine"


def _torch_options(given: TorchOptionsDict) -> TorchOptions:
    """Check the options of a PyTorch model."""
    from fewstep.inference.options import TorchOptions

    check_known("load", given, TorchOptions.__dataclass_fields__)
    plain: dict[str, Any] = {name: _checked(name, value) for name, value in given.items()} | {"lora": ()}
    if given.get("lora", ()) != ():
        from fewstep.families.lora.adapters import specs

        plain["lora"] = specs(given.get("lora"))
    return TorchOptions(**(plain if given.keys() - {"lora"} else PLAIN | plain))


def _checked(name: str, value: object) -> object:
    """Return an option of :func:`load` other than ``lora``, as the command line gives it.

    Raises:
        UserError: the value is of another type or not allowed.
    """
    from fewstep.inference.options import Bits, Device

    if name == "batch":
        return check_int(name, value, 1, MOST_AT_ONCE)
    if name in ("compile", "image") and not isinstance(value, bool):
        raise UserError(f"{name} must be True or False, not {_shown(value)}")
    choices = {"bits": (None, *get_args(Bits)), "device": get_args(Device)}.get(name)
    if choices is not None and (type(value) not in map(type, choices) or value not in choices):
        some = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UserError(f"{name} must be one of {some}, not {_shown(value)}")
    if name in ("student", "tiny_decoder") and isinstance(value, Path):
        return str(value)
    if name in _TEXTS and not isinstance(value, str | None):
        raise UserError(f"{name} must be {_TEXTS[name]}, not {_shown(value)}")
    return value


_TEXTS = {
    "student": "the path of a folder or file",
    "tiny_decoder": "the path of a folder",
    "memory": 'a text such as "24GiB"',
    "size": 'a text such as "768x512"',
}


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split())[:40]} ({type(value).__name__})"


def quiet_loggers() -> None:
    """Let the loggers :data:`NOISY` report errors only."""
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)


def load_family(
    source: str, *, device: str = "cpu", dtype: str = "float32", t5: bool | None = None
) -> Family:
    """Load a PyTorch model of any family, with access to its parts.

    Args:
        source: a folder with a diffusers pipeline, a single-file checkpoint, or a hub name.
        device: torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        t5: whether to load T5, for a family that can do without; ``None`` loads it if the folder has it.

    Raises:
        UserError: there is no such model, it is a bundle, it is damaged, or its family needs T5.
    """
    family, source = parse_family(source)
    place = resolve(source)
    architecture = _open_family(source, place, family)
    return architecture.load(place if place.exists() else source, device=device, dtype=dtype, t5=t5)


def kind_of(source: str) -> str:
    """Return the name of a PyTorch model's family, and load nothing.

    Raises:
        UserError: as :func:`load_family`.
    """
    family, source = parse_family(source)
    return _open_family(source, resolve(source), family).name


def _load_bundle(name: str, bundle: Bundle, threads: int | None, engine: RuntimeEngine | None) -> Pipeline:
    from fewstep.runtime.model import open_bundle

    try:
        model = open_bundle(bundle, threads, engine)
    except ImportError as error:
        raise missing_extra(error) or error from None
    from fewstep.pipeline.pipeline import Pipeline  # slow imports, while the graphs are loaded

    return Pipeline(model, bundle, name)


def _load_torch(
    name: str, place: Path, threads: int | None, options: TorchOptions | None, family: str | None
) -> Pipeline:
    from fewstep.inference.options import TorchOptions
    from fewstep.pipeline.pipeline import Pipeline

    plain = parse_family(name)[1]
    _check_torch(options)
    try:
        import torch

        architecture = _family(plain, place, family)
        if threads is not None:
            torch.set_num_threads(threads)
        if place.is_file():
            why = f"is for diffusers folders, and {place} is a single file"
            return _load_plain(name, place, architecture, options, why)
        if "vae" not in architecture.required:
            why = f"is for models with an autoencoder, and {plain} has none"
            return _load_plain(name, place, architecture, options, why)
        options = options or TorchOptions(**PLAIN)
        from fewstep.inference.load import load as load_staged

        folder = place if place.exists() else architecture.download(plain)
        staged = load_staged(folder, architecture, options)
    except ImportError as error:
        raise missing_extra(error) or error from None
    choice = staged.plan.config
    facts = {
        "bits": choice.bits, "student": options.student, "lora": options.lora or None,
        "tiny_decoder": options.tiny_decoder,
    }  # fmt: skip
    pipe = Pipeline(staged.model, source=name, record_fields=facts)
    if staged.plan.limit is None:
        return pipe
    return replace(pipe, plan=staged.lines, max_batch=choice.batch)


def _check_torch(options: TorchOptions | None) -> None:
    """Check libraries and options before PyTorch is imported.

    Raises:
        UserError: a library is missing, or a value is invalid or names no file.
    """
    from fewstep.core.validate import parse_bytes

    need("torch", "diffusers", "transformers")
    if options is None:
        return
    if options.memory is not None:
        parse_bytes(options.memory)
    for option, place in (("student", options.student), ("tiny-decoder", options.tiny_decoder)):
        if place is not None and not os.path.exists(place):
            raise UserError(f"there is no {option} {place}: give a folder or file that is there")


def _load_plain(
    name: str, place: Path, architecture: Architecture, options: TorchOptions | None, why: str
) -> Pipeline:
    """Load a model in float32 on the CPU without a memory plan, and add LoRAs.

    Args:
        name: the model as the caller names it.
        place: its folder or file.
        architecture: its family.
        options: how to run it.
        why: why other options than ``lora`` are refused; it follows the option's name.

    Raises:
        UserError: another option is given, or the model is missing or damaged.
    """
    from fewstep.families.lora import adapters
    from fewstep.inference.options import TorchOptions
    from fewstep.modules.adaln import PrecomputedAdaLN
    from fewstep.pipeline.pipeline import Pipeline

    given = () if options is None else options.lora
    if options is not None and options != TorchOptions(**PLAIN, lora=given):
        others = [option for option in options.named() if option != "--lora"]
        if others:
            raise UserError(f"{others[0]} {why}")
    model = architecture.load(place)
    adapters.apply(model.parts, architecture, given)
    facts = {"lora": given} if given else {}
    net: Any = model.velocity
    velocity = net if architecture.modulation is None else PrecomputedAdaLN(net, architecture.modulation)
    return Pipeline(replace(model, velocity=velocity), source=name, record_fields=facts)


def _open_family(source: str, place: Path, wanted: str | None = None) -> Architecture:
    """Return the family that reads a model; a bundle has none."""
    if (place / "bundle.json").is_file():
        can = "for generation, and for export --to openvino"
        raise UserError(f"model {source} is a bundle, {can}; give a diffusers folder")
    return _family(source, place, wanted)


def _family(name: str, place: Path, wanted: str | None = None) -> Architecture:
    """Return the family that reads a PyTorch model.

    Args:
        name: the model's name without a family.
        place: its folder or file; it does not exist for a hub name.
        wanted: the family that the caller names.

    Raises:
        UserError: no family reads it, it is another than ``wanted``, or the hub cannot be reached.
    """
    quiet_loggers()
    from fewstep.families.registry import architecture, architecture_of, architecture_of_files

    asked = None if wanted is None else architecture(wanted)
    if place.is_file():  # a file of another layout is refused when it is read
        found = architecture_of_files(asked)
    elif place.is_dir():
        found = architecture_of(place, asked)
    else:
        from huggingface_hub import hf_hub_download

        try:
            index = hf_hub_download(name, "model_index.json")
        except Exception as error:
            raise unreachable(name, error) from None
        found = architecture_of(Path(index).parent, asked)
    if asked not in (None, found):
        raise UserError(f"model {name} is of the family {found.name}, not {wanted}: say {found.name}:{name}")
    return found
