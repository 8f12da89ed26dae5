"""Which tensor of a file is which tensor of a net.

Every tensor of a file is used, known not to affect the net, or a reason to refuse the file (:func:`resolve`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fewstep.core.types import UserError
from fewstep.families.safetensors_tensors import DTYPES, FLOATS, Shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

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


class LoadWarning(UserWarning):
    """A file holds something that its net does not use, and that changes no image."""


class Stored(Protocol):
    """Tensors that lie somewhere."""

    @property
    def where(self) -> Path: ...

    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by the names that the tensors are stored under."""
        ...

    def kind(self, name: str) -> str:
        """Kind of numbers (:data:`fewstep.families.safetensors_tensors.DTYPES`)."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor, its scale multiplied in."""
        ...

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same."""
        ...


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


def tied(net: Module) -> Mapping[str, str]:
    """Names of a net's tensors that are other ones of its tensors: ``{name: the other}``."""
    return getattr(net, "_tied_weights_keys", None) or {}


def resolve(net: Module, stored: Stored) -> dict[str, str]:
    """Return which stored tensor is which of ``net``'s.

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


def _without_effect(name: str, net: Module) -> bool:
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
