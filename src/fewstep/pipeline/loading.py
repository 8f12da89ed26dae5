"""Where models come from: the package, a folder, a hub name."""

from __future__ import annotations

import logging
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.optional import missing_extra, need
from fewstep.core.run_folder import RUN, unfinished
from fewstep.core.types import UserError
from fewstep.core.validate import MOST_AT_ONCE, check_int
from fewstep.pipeline.params import check_known

if TYPE_CHECKING:
    from typing import Unpack

    from fewstep.families.base import Architecture, Family
    from fewstep.inference.options import TorchOptions, TorchOptionsDict
    from fewstep.pipeline.pipeline import Pipeline
    from fewstep.runtime.bundle import Bundle


class ShippedWarning(UserWarning):
    """A name means a model that ships and a folder too."""


Backend = Literal["onnx", "openvino", "executorch", "torch"]
NOISY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that tell, as soon as diffusers finds torchao, of kernels that nobody here asks for."""

INDEXES = ("bundle.json", "model_index.json")
"""What makes a folder a model: a bundle's manifest, or diffusers' index."""

LORA = "pytorch_lora_weights.safetensors"
"""In the subfolder ``lora`` of a run."""

DEFAULT = "pocket"
PLAIN: dict[str, Any] = {"device": "cpu", "bits": 32}
"""How a PyTorch model runs where nobody says."""
SHIPPED = Path(__file__).parents[1] / "models"
SHIPS = ["*.json", "*.onnx", "*.data", "*.xml", "*.bin", "*.pte", "LICENSE*", "README.md"]
"""Files of a bundle on the hub, where others may lie beside it."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(
    source: str | Path | None = None,
    backend: Backend | None = None,
    threads: int | None = None,
    **wish: Unpack[TorchOptionsDict],
) -> Pipeline:
    """Load a model for generation.

    Args:
        source: name of a model that ships with fewstep (``None``: ``pocket``); a folder with a bundle or a
            diffusers pipeline; the folder of a finished run; a single-file ``.safetensors`` checkpoint; or a
            hub name, ``org/name``. With ``FAMILY:`` in front it must be a PyTorch model of that family:
            ``sd3``, ``flux``, or the import path of a module that has an ``ARCHITECTURE``.
        backend: ``onnx``, ``openvino`` or ``executorch`` insists on a bundle for that engine, ``torch``
            on a PyTorch pipeline; ``None`` takes what is there.
        threads: processor threads; all cores when ``None``.
        wish: how a PyTorch model shall run: ``student``, ``lora`` (``FILE[:WEIGHT]``, or several),
            ``memory``, ``bits``, ``tiny_decoder``, ``size``, ``device``, ``compile``, and what memory is
            planned for, ``batch`` and ``image`` (:class:`fewstep.inference.options.TorchOptions`).
            Without any of them but ``lora`` it runs in float32 on the CPU, as in benchmarks.

    Raises:
        UserError: there is no such model, it is damaged, what it needs is not installed, or it does not fit.
    """
    threads = None if threads is None else counted_threads(threads, 1)
    name = DEFAULT if source is None else _name(source)
    family, plain = parse_family(name)
    place = resolve(plain)
    bundle = _bundle(place)
    kind: Backend = "torch" if bundle is None else bundle.engine
    if backend not in (None, *get_args(Backend)):
        raise UserError(f"unknown backend {backend!r}: give one of {', '.join(get_args(Backend))}")
    if backend is not None and backend != kind:
        raise UserError(f"model {name} runs on {kind}, not on {backend}: {_way(name, kind, backend)}")
    given = _wish(wish) if wish else None
    if bundle is None:
        return _load_torch(name, place, threads, given, family)
    odd = [*([f"{family}:"] if family is not None else []), *(given.named() if given is not None else [])]
    if odd:
        raise UserError(f"model {plain} is a bundle, and {odd[0]} is for PyTorch models: leave it out")
    return _load_bundle(name, bundle, threads)


def _name(source: Any) -> str:
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str):
        raise UserError(f"a model is named by a text or a path, not {type(source).__name__}")
    return name


def _way(name: str, kind: Backend, wanted: Backend) -> str:
    """What to do about a model for another engine than the one wanted."""
    if wanted == "torch":
        return "give a diffusers folder"
    if (kind, wanted) == ("onnx", "openvino"):
        return f"`fewstep export {name} --to openvino` makes a bundle of it"
    return f"`fewstep export --to {wanted}` makes a bundle of a diffusers folder"


def _wish(given: TorchOptionsDict) -> TorchOptions:
    from fewstep.inference.options import TorchOptions

    check_known("load", given, TorchOptions.__dataclass_fields__)
    plain: dict[str, Any] = {name: _checked(name, value) for name, value in given.items()} | {"lora": ()}
    if given.get("lora", ()) != ():
        from fewstep.families.lora.adapters import specs  # as above

        plain["lora"] = specs(given.get("lora"))
    return TorchOptions(**(plain if given.keys() - {"lora"} else PLAIN | plain))


def _checked(name: str, value: Any) -> Any:
    """An option of :func:`load` other than ``lora``, as the command line would give it.

    Raises:
        UserError: it is of another type, or none of its values.
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


def _shown(value: Any) -> str:
    return f"{' '.join(repr(value).split())[:40]} ({type(value).__name__})"


def quiet_loggers() -> None:
    """Let :data:`NOISY` loggers tell errors alone."""
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)


def parse_family(name: str) -> tuple[str | None, str]:
    """Split ``FAMILY:NAME`` (:func:`fewstep.families.registry.parse_family`); most names have no family."""
    if ":" not in name:
        return None, name
    from fewstep.families import registry

    return registry.parse_family(name)


def is_bundle(name: str | None) -> bool:
    """Whether a name is that of a bundle here; what is on the hub is not asked for."""
    plain = DEFAULT if name is None else parse_family(name)[1]
    shipping = plain in (folder.name for folder in builtin_models())
    return shipping or any(os.path.isfile(f"{plain}/{part}bundle.json") for part in ("", "model/"))


def builtin_models() -> list[Path]:
    """Folders of the bundles that are installed with fewstep."""
    return sorted(path.parent for path in SHIPPED.glob("*/bundle.json"))


def resolve(name: str) -> Path:
    """The folder or file of a model; of a run's folder the model that it wrote.

    A bundle on the hub is fetched into the hub's own cache.

    Raises:
        UserError: there is none, or the run has not finished.
    """
    here = Path(name)
    if len(name) > 4096 or any(len(part.encode(errors="replace")) > 255 for part in here.parts):
        raise UserError(f"there is no model of such a name: {name[:40]}…")
    if name in (names := [folder.name for folder in builtin_models()]):
        if os.path.isdir(name):
            text = f"{name} is the model that ships with fewstep; for the folder here say ./{name}"
            warnings.warn(text, ShippedWarning, stacklevel=2)
        return SHIPPED / name
    if os.path.isdir(name):  # unlike Path.is_dir it tells of odd names only that they are none
        return _model_in(here)
    if os.path.isfile(name) and here.suffix == ".safetensors":
        return here
    if not os.path.exists(name) and _HUB_NAME.fullmatch(name):
        return _fetch(name)
    have = ", ".join(names) or "none are installed"
    raise UserError(f"there is no model {name!r}: give a folder, a hub name (org/name) or one of: {have}")


def _model_in(folder: Path) -> Path:
    """The model that a folder is, or that the run in it wrote.

    Raises:
        UserError: there is none. The line says what the folder is instead.
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
    """The bundle that a source is; ``None`` for a PyTorch model.

    Raises:
        UserError: there is no such model, or the bundle is damaged.
    """
    return _bundle(resolve(parse_family(source)[1]))


def load_family(
    source: str, *, device: str = "cpu", dtype: str = "float32", t5: bool | None = None
) -> Family:
    """Load a PyTorch model with its parts open, whichever family's it is.

    Args:
        source: a folder with a diffusers pipeline, a single-file checkpoint, or a hub name.
        device: torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        t5: of a family that can do without T5: whether to load it; ``None`` loads it where it is there.

    Raises:
        UserError: there is no such model, it is a bundle, it is damaged, or its family needs T5.
    """
    family, source = parse_family(source)
    place = resolve(source)
    architecture = _open_family(source, place, family)
    return architecture.load(place if place.exists() else source, device=device, dtype=dtype, t5=t5)


def kind_of(source: str) -> str:
    """Return the name of a PyTorch model's family. Nothing of the model is loaded.

    Raises:
        UserError: as :func:`load_family`.
    """
    family, source = parse_family(source)
    return _open_family(source, resolve(source), family).name


def _bundle(place: Path) -> Bundle | None:
    """What a bundle's folder says of itself; ``None`` for anything else."""
    if not (place / "bundle.json").is_file():
        return None
    from fewstep.runtime.bundle import read

    return read(place)


def _load_bundle(name: str, bundle: Bundle, threads: int | None) -> Pipeline:
    from fewstep.runtime.model import open_bundle

    try:
        model = open_bundle(bundle, threads)
    except ImportError as error:
        raise missing_extra(error) or error from None
    from fewstep.pipeline.pipeline import Pipeline  # its imports take a while, in which the graphs are loaded

    return Pipeline(model, bundle, name)


def _load_torch(
    name: str, place: Path, threads: int | None, wish: TorchOptions | None, family: str | None
) -> Pipeline:
    from fewstep.inference.options import TorchOptions
    from fewstep.pipeline.pipeline import Pipeline

    plain = parse_family(name)[1]
    _check_torch(wish)
    try:
        import torch

        architecture = _family(plain, place, family)
        if threads is not None:
            torch.set_num_threads(threads)
        if place.is_file():
            return _load_single(name, place, architecture, wish)
        wish = wish or TorchOptions(**PLAIN)
        from fewstep.inference.load import load as load_staged

        folder = place if place.exists() else architecture.download(plain)
        staged = load_staged(folder, architecture, wish)
    except ImportError as error:
        raise missing_extra(error) or error from None
    choice = staged.plan.config
    facts = {
        "bits": choice.bits, "student": wish.student, "lora": wish.lora or None,
        "tiny_decoder": wish.tiny_decoder,
    }  # fmt: skip
    pipe = Pipeline(staged.model, source=name, record_fields=facts)
    if staged.plan.limit is None:
        return pipe
    return replace(pipe, plan=staged.lines, max_batch=choice.batch)


def _check_torch(wish: TorchOptions | None) -> None:
    """Refuse, before PyTorch is imported, what cannot be.

    Raises:
        UserError: a library is missing, or a value or a place that was asked for is none.
    """
    from fewstep.core.validate import parse_bytes

    need("torch", "diffusers", "transformers")
    if wish is None:
        return
    if wish.memory is not None:
        parse_bytes(wish.memory)
    for option, place in (("student", wish.student), ("tiny-decoder", wish.tiny_decoder)):
        if place is not None and not os.path.exists(place):
            raise UserError(f"there is no {option} {place}: give a folder or file that is there")


def _load_single(name: str, place: Path, architecture: Architecture, wish: TorchOptions | None) -> Pipeline:
    """A single file: read whole, in float32 on the CPU, and LoRAs added."""
    from fewstep.families.lora import adapters
    from fewstep.inference.options import TorchOptions
    from fewstep.modules.adaln import PrecomputedAdaLN
    from fewstep.pipeline.pipeline import Pipeline

    given = () if wish is None else wish.lora
    if wish is not None and wish != TorchOptions(**PLAIN, lora=given):
        others = [option for option in wish.named() if option != "--lora"]
        if others:
            raise UserError(f"{others[0]} is for diffusers folders, and {place} is a single file")
    model = architecture.load(place)
    adapters.apply(model.parts, architecture, given)
    facts = {"lora": given} if given else {}
    net: Any = model.velocity
    velocity = PrecomputedAdaLN(net, architecture.modulation)
    return Pipeline(replace(model, velocity=velocity), source=name, record_fields=facts)


def _open_family(source: str, place: Path, wanted: str | None = None) -> Architecture:
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
        UserError: no family reads it, it is another than ``wanted``, or the hub does not say whose the
            model is.
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
            raise _unreached(name, error) from None
        found = architecture_of(Path(index).parent, asked)
    if asked not in (None, found):
        raise UserError(f"model {name} is of the family {found.name}, not {wanted}: say {found.name}:{name}")
    return found


def _fetch(name: str) -> Path:
    """The folder of a bundle on the hub; a diffusers pipeline there is left to its family's own loader.

    A bundle that has been fetched once is used as it is, so that generation asks no network.
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
        raise _unreached(name, error) from None
    if "model_index.json" not in files:
        raise UserError(f"{name} on the hub is no model for fewstep: no bundle.json, no model_index.json")
    return Path(name)


def _unreached(name: str, error: Exception) -> UserError:
    """The line for whatever the hub's client raised: errors of several network libraries."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"there is no folder {name}, and the hub cannot be asked for it: {reason}")


def _complete(folder: Path) -> bool:
    from fewstep.runtime.bundle import read

    try:
        read(folder)
    except UserError:  # a fetch that was cut off: fetch the rest
        return False
    return True
