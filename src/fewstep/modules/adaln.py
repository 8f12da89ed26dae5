"""Splits the adaLN modulation off a net, to compute it once per image.

The layers that make shifts, scales and gates (adaLN: Peebles and Xie, arXiv 2212.09748) depend on the time
and the pooled text alone. They hold a third of an MMDiT's weights, which a step then need not read. A net is
split into a module that makes the modulation of a time, and the net that takes it. No weight is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.flow import expand_time
from fewstep.core.types import Array, Cond, Step, Velocity

EMBEDDER = "time_text_embed"
"""The submodule of diffusers' SD3 and FLUX nets that embeds time and pooled text. All modulation reads it."""


class NetVelocity(Velocity, Protocol):
    """A family's velocity: a dataclass with its net as a field."""

    @property
    def net(self) -> nn.Module: ...

    def embedder_inputs(self, t: Array, pooled: Array) -> tuple[Array, ...]:
        """Return the inputs of the net's embedder at ``t [B]``, the pooled text ``[B, P]`` last."""
        ...


@dataclass(frozen=True)
class PrecomputedAdaLN:
    """A velocity that computes the modulation of all steps of a trajectory before the first one.

    For nets that are not trained, sharded or compiled: those change a module in place, and a copy runs here.

    Attributes:
        velocity: the family's velocity.
        embedder: see :func:`split_modulation`.
    """

    velocity: NetVelocity
    embedder: str | None = EMBEDDER

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> ``[B, C, H, W]``."""
        return self.velocity(x_t, t, cond)

    def with_guidance(self, scale: float) -> PrecomputedAdaLN:
        """Return the same velocity at another scale of the embedded guidance."""
        whole: Any = self.velocity
        return replace(self, velocity=whole.with_guidance(scale))

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """Return a step for each of ``times``."""
        modulation, net = split_modulation(self.velocity.net, self.embedder)
        whole: Any = self.velocity
        body: Velocity = replace(whole, net=net)
        made = modulation.each(
            [modulation.inputs(whole, expand_time(t, cond.context), cond.pooled) for t in times]
        )

        def step(t: float, modulations: Tensor) -> Step:
            return lambda x: body(x, expand_time(t, x), Cond(cond.context, modulations))

        return [step(*pair) for pair in zip(times, made, strict=True)]


Resident = Callable[[nn.Module], AbstractContextManager[object]]


def _resident(layer: nn.Module) -> AbstractContextManager[object]:
    return nullcontext()


class Modulation(nn.Module):
    """Computes all modulations of a net, concatenated."""

    def __init__(self, embedder: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedder = embedder
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the modulation ``[B, M]`` of the embedder's inputs, the pooled text ``[B, P]`` last."""
        return self.each([inputs])[0]

    def inputs(self, velocity: NetVelocity, t: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        """Return the embedder's inputs at ``t [B]``; the pooled text alone where nothing was split off."""
        return velocity.embedder_inputs(t, pooled) if self.layers else (pooled,)

    def each(self, steps: Sequence[Sequence[Tensor]], resident: Resident = _resident) -> list[Tensor]:
        """Return the modulation of several steps. Each layer's weights are read once for all of them.

        Each step has a matrix product of its own: one product for all could sum in another order and change
        the image.

        Args:
            steps: inputs of the embedder at each step.
            resident: context manager in which a layer has its weights; by default all have them.
        """
        if not self.layers:
            return [inputs[-1] for inputs in steps]
        with resident(self.embedder):
            embeddings = [nn.functional.silu(self.embedder(*inputs)) for inputs in steps]
        made: list[list[Tensor]] = []
        for layer in self.layers:
            with resident(layer):
                made.append([layer(embedding) for embedding in embeddings])
        return [torch.cat(parts, dim=-1) for parts in zip(*made, strict=True)]


class _Given(nn.Module):
    """Replaces the embedder: returns the modulation, which is passed as the pooled text."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[-1]


class Slice(nn.Module):
    """Replaces a modulation layer: returns its slice of the modulation."""

    def __init__(self, start: int, size: int) -> None:
        super().__init__()
        self.start, self.size = start, size

    def forward(self, modulations: Tensor) -> Tensor:
        return modulations.narrow(-1, self.start, self.size)


def split_modulation(net: Any, embedder: str | None = EMBEDDER) -> tuple[Modulation, Any]:
    """Split a net into its modulation and the net without it, which takes the modulation as pooled text.

    Args:
        net: a transformer of diffusers; it is not changed.
        embedder: attribute of the net that embeds time and pooled text. ``None`` splits nothing off: the
            modulation then is the pooled text, and the net is whole.

    Raises:
        ValueError: the net has no such embedder, or nothing that it modulates.
    """
    if embedder is None:
        return Modulation(nn.Identity(), []), net
    norms = {
        name: norm
        for name, norm in net.named_modules()
        if isinstance(getattr(norm, "silu", None), nn.SiLU)
        and isinstance(getattr(norm, "linear", None), nn.Module)
    }
    embed = getattr(net, embedder, None)
    if embed is None or not norms:
        raise ValueError(f"{type(net).__name__} has no modulations to take out")
    at = 0
    instead: dict[str, nn.Module] = {embedder: _Given()}
    for name, norm in norms.items():
        size = norm.linear.out_features
        instead |= {f"{name}.linear": Slice(at, size), f"{name}.silu": nn.Identity()}
        at += size
    return Modulation(embed, [norm.linear for norm in norms.values()]), with_submodules(net, instead)


def with_submodules(net: Any, instead: Mapping[str, nn.Module]) -> Any:
    """Return ``net`` with other modules at some paths. All else is shared, and ``net`` is not changed."""
    other = copy.copy(net)
    other._modules = dict(net._modules)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, module in instead.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = module
        else:
            other._modules[name] = module
    for name, modules in below.items():
        other._modules[name] = with_submodules(net._modules[name], modules)
    return other
