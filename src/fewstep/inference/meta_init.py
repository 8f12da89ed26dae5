"""Initialization of nets on the meta device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.types import UserError
from fewstep.families.config_check import class_of, make_net
from fewstep.families.diffusers_io import first_line
from fewstep.families.spec import ModelSpec


def init_on_meta(spec: ModelSpec, part: str, dtype: torch.dtype) -> nn.Module:
    """Return a frozen net on the meta device, with shapes and without values.

    Raises:
        UserError: the class is unknown, or the configuration is invalid.
    """
    from accelerate import init_empty_weights

    # Files of diffusers nets contain the buffers, of which a position table takes gigabytes to compute.
    # Files of text encoders do not contain them, so they are computed here.
    ours = hasattr(class_in(spec, part), "load_config")
    with torch.device("meta") if ours else init_empty_weights(include_buffers=False):
        net = cast("Any", init_from_config(spec, part))
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = frozen_parameter(parameter.to(dtype))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = buffer.to(dtype)
    return net.eval()


def init_from_config(spec: ModelSpec, part: str) -> nn.Module:
    """Return a net of its class and configuration with arbitrary weights.

    Raises:
        UserError: see :func:`init_on_meta`.
    """
    net_class = class_in(spec, part)
    try:
        return make_net(net_class, spec.configs[part])
    except Exception as error:  # the libraries do not validate configurations
        name = net_class.__name__
        raise UserError(f"the configuration of the {part} makes no {name} ({first_line(error)})") from None


def class_in(spec: ModelSpec, part: str) -> type[nn.Module]:
    """Return the class of a part.

    Raises:
        UserError: the class is unknown.
    """
    where = str(spec.folder or "the spec")
    return class_of(spec.classes[part], part, where, spec.architecture)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    """Return a parameter without gradient."""
    return nn.Parameter(tensor, requires_grad=False)
