"""Nets made of a configuration and of stored weights: the one way for every net."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.families.safetensors_match import Stored, resolve, tied
from fewstep.families.safetensors_weights import Weights

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


def empty(kind: Any, folder: Path) -> Module:
    """A net of the class ``kind`` with the configuration in ``folder``, its weights without data.

    Raises:
        UserError: the configuration says that its weights are quantized.
        OSError: and others: what diffusers and transformers raise for a configuration that makes no net.
    """
    import torch
    from accelerate import init_empty_weights

    refuse_quantized(json_io.read(folder / "config.json"), folder)
    # Most buffers of diffusers' nets lie in their files, and a table of positions takes gigabytes to make.
    # Those that are in no file are computed when the net is made.
    if hasattr(kind, "load_config"):
        config = kind.load_config(folder)
        with torch.device("meta"):
            net = kind.from_config(config)
        if not any(module._non_persistent_buffers_set for module in net.modules()):
            return net
        with init_empty_weights(include_buffers=False):
            return kind.from_config(config)
    config = kind.config_class.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        return kind(config)


def refuse_quantized(config: Mapping[str, object], folder: Path) -> None:
    """Refuse the configuration of a net whose weights another library has quantized.

    Raises:
        UserError: it is one.
    """
    if any(config.get(key) for key in ("quantization_config", "compression_config")):
        raise UserError(f"{folder} holds weights that are quantized already: give the model in 16 or 32 bits")


def fill(net: Any, stored: Stored, dtype: torch.dtype) -> Any:
    """Give ``net`` its weights.

    Args:
        net: from :func:`empty`.
        stored: what they are made of.
        dtype: torch dtype that they are cast to.

    Returns:
        The net, in eval mode.

    Raises:
        UserError: see :func:`fewstep.families.safetensors_match.resolve`.
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


def read_net(kind: Any, folder: Path, dtype: torch.dtype) -> Module:
    """A net of the class ``kind`` from a part's folder.

    Raises:
        UserError: see :func:`empty`, and :meth:`fewstep.families.safetensors_weights.Weights.open`.
    """
    return fill(empty(kind, folder), Weights.open(folder), dtype)
