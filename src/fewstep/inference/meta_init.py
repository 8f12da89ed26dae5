"""Nets with shapes and no bytes (floor 3, torch)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.types import UserError
from fewstep.families.config_check import class_of, make_net
from fewstep.families.diffusers_io import first_line
from fewstep.families.spec import ModelSpec


def init_on_meta(outline: ModelSpec, part: str, dtype: torch.dtype) -> Any:
    """A net with the shapes of its weights and none of their bytes, frozen.

    Raises:
        UserError: its class is unknown, or its configuration makes no net.
    """
    from accelerate import init_empty_weights

    # Buffers of diffusers' nets lie in their files, and a table of positions takes gigabytes to make; those
    # of text encoders are counted up when they are made, and in no file.
    ours = hasattr(class_in(outline, part), "load_config")
    with torch.device("meta") if ours else init_empty_weights(include_buffers=False):
        net = init_from_config(outline, part)
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = frozen_parameter(parameter.to(dtype))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = buffer.to(dtype)
    return net.eval()


def init_from_config(outline: ModelSpec, part: str) -> Any:
    """A net of its class and configuration, its weights whatever they are.

    Raises:
        UserError: see :func:`init_on_meta`.
    """
    net_class = class_in(outline, part)
    try:
        return make_net(net_class, outline.configs[part])
    except Exception as error:  # of two libraries that believe what they read
        name = net_class.__name__
        raise UserError(f"the configuration of the {part} makes no {name} ({first_line(error)})") from None


def class_in(outline: ModelSpec, part: str) -> Any:
    """Return the class of a part.

    Raises:
        UserError: the class is unknown.
    """
    where = str(outline.folder or "the outline")
    return class_of(outline.classes[part], part, where, outline.architecture)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(tensor, requires_grad=False)
