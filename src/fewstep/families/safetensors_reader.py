"""Weights in ``.safetensors`` files, read tensor by tensor: the one way for every net.

A reader that maps whole files counts them as this process's memory, and one that loads whole parts needs them
twice where they are cast. Here a tensor is in memory once, and no other beside it.

Every tensor of a file is used, known to say nothing about the net, or a reason to refuse the file
(:func:`resolve`). 8-bit floats are multiplied by the scales beside them where the layout leaves no doubt.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Mapping[str, str] = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""Kinds of numbers in a safetensors file, and what torch calls them."""

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NARROW = ("F8_E4M3", "F8_E5M2")
"""Kinds that are read as float32: torch has no arithmetic for them."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Quantization formats (of ComfyUI) that are 8-bit floats with a scale."""


SCALES = (".scale_weight", ".weight_scale")
"""Ends of the names of scales: ComfyUI's, and that of most others. Each multiplies ``.weight``."""

SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"
"""The two names of T5's one table of embeddings."""

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Layers of an autoencoder's attention, and their names in folders of old versions of diffusers."""

UNUSED: Mapping[str, str] = {
    "": r"(^|\.)(num_batches_tracked|logit_scale|input_scale|scale_input)$|^(model_ema|loss)\.",
    "CLIP": r"^(vision_model|visual_projection)\.",
    "T5": r"^(decoder|lm_head)\.",
}
"""Names of tensors that change nothing, by what the class of the net begins with: copies for training,
counters, towers that are not asked, and scales of activations, which are not quantized here."""

QUANTIZED = re.compile(r"scale|zero|quant|absmax|qweight|_data$|nested|codebook", re.IGNORECASE)

Shape = tuple[int, ...]


class LoadWarning(UserWarning):
    """A file holds something that its net does not use, and that changes no image."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its first byte there, its kind (:data:`DTYPES`) and its shape."""

    path: Path
    offset: int
    kind: str
    shape: Shape

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    def read(self) -> Tensor:
        """The tensor in memory of its own, as it is stored.

        Raises:
            UserError: the file is cut off, or holds numbers of an unknown kind.
        """
        import torch

        if self.kind not in DTYPES:
            raise UserError(f"{self.path} holds numbers of a kind that is not known: {self.kind}")
        # Memory of torch is aligned: products may round by that.
        tensor = torch.empty(self.shape, dtype=getattr(torch, DTYPES[self.kind]))
        room = tensor.reshape(-1).view(torch.uint8).numpy()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(room) != room.size:  # pyright: ignore[reportArgumentType]
                raise UserError(f"{self.path} is cut off")
        return tensor


def header(path: Path) -> dict[str, Entry]:
    """The tensors of one ``.safetensors`` file.

    Raises:
        UserError: it is none, it is cut off, or it is quantized in a way that is not followed.
    """
    head = read_header(path)
    if (said := head.metadata.get("_quantization_metadata")) is not None:
        _check_formats(said, path)
    return {
        name: Entry(path, head.start + tensor.data_offsets[0], tensor.dtype, tensor.shape)
        for name, tensor in head.tensors.items()
    }


def _item_bytes(kind: str) -> int | None:
    digits = re.search(r"\d+", DTYPES.get(kind, "").replace("bool", "uint8"))
    return int(digits[0]) // 8 if digits else None


def _check_formats(text: str, where: Path) -> None:
    """Refuse layers that ComfyUI's description says to be of other formats than 8-bit floats."""
    said: dict[str, Any] = json_io.parse(text, dict[str, Any], f"{where}: _quantization_metadata")
    layers = said.get("layers", said)
    for layer in layers.values() if isinstance(layers, dict) else ():  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        _check_format(layer, where)


def _check_format(layer: Any, where: Path) -> None:
    if isinstance(layer, dict):
        said: dict[str, Any] = layer  # pyright: ignore[reportUnknownVariableType]
        if odd := sorted(key for key, value in said.items() if value and key not in QUANT_FIELDS):
            raise UserError(f"{where} is quantized with {odd[0]}, which is not followed: {IN_FLOATS}")
    found = layer.get("format") if isinstance(layer, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if found is not None and found not in FORMATS:
        raise UserError(f"{where} is quantized to {found}, which is not followed: {IN_FLOATS}")


QUANT_FIELDS = ("format", "full_precision_matrix_mult")
"""Of ComfyUI's description of a layer: all matrices are multiplied in full precision here."""
IN_FLOATS = "give the model in 16 or 32 bits, or in 8-bit floats"


class Stored(Protocol):
    """Tensors that lie somewhere."""

    @property
    def where(self) -> Path: ...

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by the names that the tensors are stored under."""
        ...

    def kind(self, name: str) -> str:
        """Kind of numbers (:data:`DTYPES`)."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor, its scale multiplied in."""
        ...

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same."""
        ...


@dataclass(frozen=True)
class Weights:
    """The tensors of one part.

    Attributes:
        folder: the part's folder, or the file of a single-file checkpoint.
        entries: its tensors by the names in its files.
        scales: by the name of an 8-bit weight, what its values are multiplied by.
        names: by the name in the net, the name in the files, where they differ (:meth:`matched`).
    """

    folder: Path
    entries: Mapping[str, Entry]
    scales: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def open(folder: Path) -> Weights:
        """Read the headers of a part's ``.safetensors`` files.

        Raises:
            UserError: there are none, one is broken, or a scale is of a layout that is not followed.
        """
        entries: dict[str, Entry] = {}
        for path in _files(folder):
            new = header(path)
            if twice := entries.keys() & new.keys():
                raise UserError(f"{folder} has {sorted(twice)[0]} in two files")
            entries |= new
        return Weights(folder, entries).scaled()

    def scaled(self) -> Weights:
        """The same with each scale assigned to its weight instead of a tensor of its own.

        Raises:
            UserError: a scale is of a layout that is not followed.
        """
        scales: dict[str, Entry] = {}
        used: set[str] = set()
        marks: list[str] = []
        for name, entry in self.entries.items():
            layer, dot, last = name.rpartition(".")
            weight = f"{layer}{dot}weight"
            if f"{dot}{last}" in SCALES and weight in self.entries and self._scales(weight, entry):
                if weight in scales:
                    raise UserError(f"{entry.path} has two scales of {weight}")
                scales[weight] = entry
                used.add(name)
            elif last == "comfy_quant" and entry.kind == "U8":
                told = bytes(entry.read().tolist()).decode("utf-8", "replace")
                _check_format(json_io.parse(told, dict[str, Any], f"{entry.path}: {name}"), entry.path)
                used.add(name)
            elif last == "scaled_fp8":  # says that there are scales
                used.add(name)
                marks.append(name)
        for mark in marks:
            if not any(name.startswith(mark.removesuffix("scaled_fp8")) for name in scales):
                raise UserError(f"{self.entries[mark].path} has {mark}, but no scale: they were lost")
        kept = {name: entry for name, entry in self.entries.items() if name not in used}
        return replace(self, entries=kept, scales=scales)

    def _scales(self, name: str, scale: Entry) -> bool:
        """Whether a scale is to be multiplied into a weight."""
        weight = self.entries[name]
        if weight.kind not in FLOATS:  # which is refused where it is used
            return False
        if weight.kind not in NARROW:
            if bool((scale.read() == 1).all()):
                return True
            raise UserError(
                f"{scale.path} has a scale beside {name}, which is of {weight.kind}: not followed"
            )
        rows = weight.shape[:1]
        if scale.kind not in FLOATS[:4] or (scale.size != 1 and scale.shape not in (rows, (*rows, 1))):
            what = f"{scale.kind} {list(scale.shape)} for {list(weight.shape)}"
            raise UserError(f"{scale.path} has a scale of {name} of a layout that is not followed: {what}")
        return True

    @property
    def where(self) -> Path:
        """The folder or file."""
        return self.folder

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by the names in the files."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def kind(self, name: str) -> str:
        """Kind of numbers of a tensor."""
        return self.entries[name].kind

    @property
    def stored(self) -> int:
        """Bytes of a number, of the widest that are read; 8-bit floats are read as 32-bit ones."""
        kinds = {entry.kind for entry in self.entries.values()} & set(FLOATS)
        wide = {"F64": 8, "F16": 2, "BF16": 2}
        return max((wide.get(kind, 4) for kind in kinds), default=4)

    def matched(self, net: Any) -> Weights:
        """The same for the tensors of ``net``, by their names there.

        Raises:
            UserError: see :func:`resolve`.
        """
        return replace(self, names=resolve(net, self))

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own: as it is stored, or 8-bit floats times their scale as float32.

        Raises:
            UserError: it is not there, or its file is cut off.
        """
        entry = self._entry(name)
        return self._plain(name, entry.read(), entry)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same; neither is in memory as a whole, unless it is scaled."""
        a, b = self.entries[one], self.entries[other]
        if a.shape != b.shape:
            return False
        if a.kind != b.kind or one in self.scales or other in self.scales:
            return bool((self.read(one).float() == self.read(other).float()).all())
        left = a.size * (_item_bytes(a.kind) or 1)
        with a.path.open("rb") as first, b.path.open("rb") as second:
            first.seek(a.offset)
            second.seek(b.offset)
            while left > 0:
                size = min(left, 2**20)
                if first.read(size) != second.read(size):
                    return False
                left -= size
        return True

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        """``tensor.reshape(shape)[cut]``; of a table of gigabytes only that is read.

        Raises:
            UserError: it is not there, or has another number of elements.
        """
        import torch

        entry = self._entry(name)
        if math.prod(shape) != math.prod(entry.shape):
            what = f"{name} has the shape {entry.shape}, not {tuple(shape)}"
            raise UserError(f"{self.folder} is another net than its configuration says: {what}")
        bits = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[_item_bytes(entry.kind) or 1]
        table = np.memmap(entry.path, bits, "r", entry.offset, tuple(shape))
        found = torch.from_numpy(np.array(table[cut])).view(getattr(torch, DTYPES[entry.kind])).clone()
        return self._plain(name, found, entry)

    def _plain(self, name: str, tensor: Tensor, entry: Entry) -> Tensor:
        scale = self.scales.get(self.names.get(name, name))
        if entry.kind in NARROW:
            tensor = tensor.float()
        if scale is None or entry.kind not in NARROW:
            return tensor
        factor = scale.read().float()
        return tensor.mul_(
            factor.reshape(-1, *[1] * (tensor.ndim - 1)) if scale.size > 1 else factor.reshape(())
        )

    def _entry(self, name: str) -> Entry:
        known = self.names.get(name, name)
        if known not in self.entries:
            raise UserError(f"{self.folder} lacks weights, among them {name}")
        return self.entries[known]


@dataclass(frozen=True)
class Converted:
    """Tensors in memory, under a net's own names or others of :func:`candidates`.

    Attributes:
        where: the file that they are from.
        tensors: by name.
    """

    where: Path
    tensors: Mapping[str, Tensor]

    def shapes(self) -> Mapping[str, Shape]:
        """See :class:`Stored`."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def kind(self, name: str) -> str:
        """See :class:`Stored`."""
        dtype = str(self.tensors[name].dtype).removeprefix("torch.")
        return next((kind for kind, known in DTYPES.items() if known == dtype), dtype)

    def read(self, name: str) -> Tensor:
        """See :class:`Stored`."""
        return self.tensors[name]

    def equal(self, one: str, other: str) -> bool:
        """See :class:`Stored`."""
        return self.tensors[one].equal(self.tensors[other])


def candidates(name: str) -> Iterable[str]:
    """Names that a tensor of a net may have in files, the net's own first."""
    yield name
    yield f"text_model.{name}"  # versions of transformers differ in whether a CLIP says so
    yield name.removeprefix("text_model.")
    if name in (SHARED, EMBEDDED):
        yield EMBEDDED if name == SHARED else SHARED
    for new, old in OLD_ATTENTION.items():
        if f".attentions.0.{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")


def tied(net: Any) -> Mapping[str, str]:
    """Names of a net's tensors that are other ones of its tensors: ``{name: the other}``."""
    return getattr(net, "_tied_weights_keys", None) or {}


def resolve(net: Any, stored: Stored) -> dict[str, str]:
    """Which stored tensor is which of ``net``'s.

    What no tensor of the net is made of must say nothing about it. That is named in a :class:`LoadWarning`,
    except for tables of positions and copies of used tensors, whose values are compared.

    Args:
        net: a module, its weights there or not.
        stored: what there is for it.

    Returns:
        ``{name in the net: stored name}`` for all of its tensors.

    Raises:
        UserError: one is missing, has another shape, or is of whole numbers; or something stored would change
            what the net computes.
    """
    shapes = stored.shapes()
    copies = tied(net)
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if name not in copies}
    names: dict[str, str] = {}
    for name in wanted:
        if found := next((known for known in candidates(name) if known in shapes), None):
            names[name] = found
    missing = sorted(wanted.keys() - names.keys())
    left = [name for name in sorted(shapes.keys() - set(names.values())) if not _repeats(name, stored, names)]
    unused = [name for name in left if _without_effect(name, net)]
    if odd := [name for name in left if name not in unused]:
        _refuse(odd, missing, stored.where)
    if missing:
        raise UserError(f"{stored.where} lacks weights, among them {missing[0]}")
    for name, shape in wanted.items():
        if stored.kind(names[name]) not in FLOATS:
            what = f"{names[name]} is of {stored.kind(names[name])}"
            raise UserError(f"{stored.where} is quantized in a way that is not followed: {what}")
        if shapes[names[name]] != shape:
            what = f"{name} has the shape {shapes[names[name]]}, not {shape}"
            raise UserError(f"{stored.where} is another net than its configuration says: {what}")
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        text = f"{stored.where}: {unused[0]}{more} passed over, which no image depends on"
        warnings.warn(text, LoadWarning, stacklevel=2)
    return names


def _repeats(name: str, stored: Stored, names: Mapping[str, str]) -> bool:
    """Whether an unused tensor says again what the net knows: positions in order, or T5's one table."""
    if name.endswith("position_ids"):
        ids = stored.read(name).flatten()
        return ids.tolist() == list(range(len(ids)))
    if name in (SHARED, EMBEDDED) and {SHARED, EMBEDDED} & set(names.values()):
        other = SHARED if name == EMBEDDED else EMBEDDED
        return stored.equal(name, other)
    return False


def _without_effect(name: str, net: Any) -> bool:
    kind = type(net).__name__
    return any(kind.startswith(start) and re.search(form, name) for start, form in UNUSED.items())


def _refuse(odd: Sequence[str], missing: Sequence[str], where: Path) -> None:
    """Refuse tensors that a net has no use for; what it lacks is named first, unless they explain that."""
    quantized = [name for name in odd if QUANTIZED.search(name)]
    if missing and not quantized:
        return
    first = (quantized or odd)[0]
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    if quantized:
        hint = (
            "if the weights are quantized, give them in 16 or 32 bits, or 8-bit floats with one scale a row"
        )
    elif "lora" in first.lower():
        hint = "give a LoRA in a file of its own"
    else:
        hint = "take it out, or give the configuration that belongs to these weights"
    raise UserError(
        f"{where} holds {first}{more}, which its net cannot use, so the image may be another: {hint}"
    )


def empty(kind: Any, folder: Path) -> Any:
    """A net of the class ``kind`` with the configuration in ``folder``, its weights without data.

    Raises:
        UserError: the configuration says that its weights are quantized.
        OSError: and others: what diffusers and transformers raise for a configuration that makes no net.
    """
    import torch
    from accelerate import init_empty_weights

    refuse_quantized(json_io.read(folder / "config.json"), folder)
    # Buffers of diffusers' nets lie in their files, and a table of positions takes gigabytes to make; those
    # of text encoders are counted up when they are made, and in no file.
    if hasattr(kind, "load_config"):
        with torch.device("meta"):
            return kind.from_config(kind.load_config(folder))
    config = kind.config_class.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        return kind(config)


def refuse_quantized(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse the configuration of a net whose weights another library has quantized.

    Raises:
        UserError: it is one.
    """
    if any(config.get(key) for key in ("quantization_config", "compression_config")):
        raise UserError(f"{folder} holds weights that are quantized already: give the model in 16 or 32 bits")


def fill(net: Any, stored: Stored, dtype: Any) -> Any:
    """Give ``net`` its weights.

    Args:
        net: from :func:`empty`.
        stored: what they are made of.
        dtype: torch dtype that they are cast to.

    Returns:
        The net, in eval mode.

    Raises:
        UserError: see :func:`resolve`.
    """
    import torch

    names = resolve(net, stored)
    # Layers that overflow in half precision: T5's, as transformers has it.
    precise = getattr(net, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    for at, name in names.items():
        layer, _, last = at.rpartition(".")
        module = net.get_submodule(layer)
        kept = any(part in precise for part in at.split("."))
        tensor = stored.read(name).to(torch.float32 if kept else dtype)
        if last in module._parameters:
            module._parameters[last] = torch.nn.Parameter(tensor)
        else:
            module._buffers[last] = tensor
    if tied(net):
        net.tie_weights()
    return net.eval()


def read_net(kind: Any, folder: Path, dtype: Any) -> Any:
    """A net of the class ``kind`` from a part's folder.

    Raises:
        UserError: see :meth:`Weights.open`, :func:`empty` and :func:`resolve`.
    """
    return fill(empty(kind, folder), Weights.open(folder), dtype)


VARIANTS = ("fp32", "fp16", "bf16")
"""Names of files of the same weights in a precision."""


def _files(folder: Path) -> list[Path]:
    """The ``.safetensors`` files of a part: the plain ones, or those of one precision where all are such."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _shards(index)
    plain = [f"{stem}.safetensors" for stem in stems]
    for variant in VARIANTS:
        for stem in stems:
            if (index := folder / f"{stem}.safetensors.index.{variant}.json").is_file() and not any(
                (folder / name).is_file() for name in plain
            ):
                return _shards(index)
            plain.append(f"{stem}.{variant}.safetensors")
    for name in plain:
        if (folder / name).is_file():
            return [folder / name]
    hint = "diffusion_pytorch_model.safetensors or model.safetensors"
    raise UserError(f"{folder} has no weights: {hint} is missing (pickled .bin files are not read)")


@dataclass(frozen=True)
class _Index:
    """Of weights in several files: ``{name: file}``."""

    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    names = sorted(set(json_io.read(index, _Index).weight_map.values()))
    if odd := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise UserError(f"{index} names {odd[0]}, which is no .safetensors file beside it")
    return [index.parent / name for name in names]
