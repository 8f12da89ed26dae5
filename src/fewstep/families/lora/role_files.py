"""Files of the adapters that training makes (:class:`fewstep.modules.lora.LoRARoles`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.atomic import replacing_file
from fewstep.core.types import UserError
from fewstep.families.lora.alpha import FILE
from fewstep.families.lora.file import read, tensor_of

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.modules.lora import LoRARoles

PREFIX = "transformer."


def save_role(roles: LoRARoles, name: str, folder: Path) -> Path:
    """Write an adapter as a LoRA that diffusers' ``load_lora_weights(folder)`` reads.

    The scale is multiplied into ``B``, so that readers need no ``alpha``.

    Args:
        roles: the adapters of a net.
        name: the one to write.
        folder: where ``pytorch_lora_weights.safetensors`` is written.

    Returns:
        The file.

    Raises:
        UserError: the disk refuses.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for path, layer in roles.layers(name).items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (roles.scale * layer.b.detach()).cpu().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(folder / FILE) as fresh:
            save_file(tensors, fresh, {"format": "pt"})
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise UserError(f"{folder / FILE} could not be written ({error})") from error
    return folder / FILE


def load_role(roles: LoRARoles, name: str, folder: Path) -> None:
    """Read an adapter that :func:`save_role` wrote, or another LoRA of the same layers and rank.

    The file's scale, wherever it is stored, and the net's are multiplied into ``B``.

    Args:
        roles: the adapters of a net.
        name: the one to overwrite.
        folder: the folder with ``pytorch_lora_weights.safetensors``.

    Raises:
        UserError: the file is missing, broken, or of another net, rank or choice of layers.
    """
    import torch

    path = folder / FILE
    try:
        factors = {each.name: each for each in read(path).factors if each.part == PREFIX[:-1]}
    except UserError as error:
        raise UserError(f"{path} cannot be read as a LoRA ({error})") from error
    layers = roles.layers(name)
    wanted = {at: ((layer.b.shape[0], layer.a.shape[1]), layer.a.shape[0]) for at, layer in layers.items()}
    if {at: (each.shape, each.rank) for at, each in factors.items()} != wanted:
        raise UserError(f"{path} is a LoRA of other layers or of another rank than this run's")
    with torch.no_grad():
        for at, layer in layers.items():
            layer.a.copy_(tensor_of(path, factors[at].down))
            layer.b.copy_(tensor_of(path, factors[at].up).float() * factors[at].scale / roles.scale)
