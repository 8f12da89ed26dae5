"""LoRA adapters that share one frozen base net: the base is the teacher, each adapter a student or a proxy.

``y = W x + (alpha / rank) B A x`` (Hu et al., arXiv 2106.09685), with an ``A`` and a ``B`` for each adapter
and one ``W``. A context manager selects the adapter around each call of the net. All of them are velocities
of their own.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from fewstep.core.types import Array, Cond, Velocity

ADAPTERS = "roles"
"""Name of the submodule of a layer that holds its adapters."""

_active: str | None = None


def active_role() -> str | None:
    """Return the name of the active adapter; ``None`` is the base alone."""
    return _active


@contextmanager
def use_role(role: str | None) -> Generator[None]:
    """Activate an adapter in all nets that have it, within the block.

    The selection is global, not per thread: the backward pass may compute a block again, in threads of its
    own.
    """
    global _active
    before, _active = _active, role
    try:
        yield
    finally:
        _active = before


class LoRALayer(nn.Module):
    """``B A x``: ``[..., in] -> [..., out]`` through ``rank``, float32. ``B`` is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        a = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        device = linear.weight.device
        self.a = nn.Parameter(a.to(device))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x.to(self.a.dtype), self.a)
        return nn.functional.linear(low, self.b)


class LoRAParameters(nn.Module):
    """The weights of one adapter as a module, for an optimizer, an average and a checkpoint."""

    def __init__(self, layers: Mapping[str, LoRALayer]) -> None:
        super().__init__()
        for path, layer in layers.items():
            self.add_module(path.replace(".", "-"), layer)

    @property
    def layers(self) -> list[LoRALayer]:
        """The layers of the adapter, in order."""
        return [cast("LoRALayer", layer) for layer in self.children()]


@torch.no_grad()
def interpolate_adapters(own: LoRAParameters, target: LoRAParameters, weight: float) -> None:
    """Move an adapter towards another one of the same net, in terms of the products ``B A``.

    ``B A`` becomes the matrix of the same rank that is nearest to ``(1 - weight) B A + weight B' A'``. The
    nearest one is a truncated singular value decomposition (Eckart and Young, 1936), taken of the stacked
    factors, so no full matrix is made. ``A`` keeps its size with orthogonal rows, and ``B`` gets the singular
    values: where the product is 0, ``B`` still has a gradient.

    Args:
        own: the adapter that is changed in place.
        target: the other one.
        weight: 0 leaves ``own`` as it is, 1 makes it equal to ``target``.
    """
    for mine, other in zip(own.layers, target.layers, strict=True):
        rank = len(mine.a)
        left, right_b = torch.linalg.qr(torch.cat([(1 - weight) * mine.b, weight * other.b], 1))
        right, right_a = torch.linalg.qr(torch.cat([mine.a, other.a]).T)
        u, s, vh = torch.linalg.svd(right_b @ right_a.T)
        size = mine.a.norm() / rank**0.5
        mine.b.copy_(left @ u[:, :rank] * (s[:rank] / size))
        mine.a.copy_(size * (right @ vh[:rank].T).T)


@dataclass(frozen=True)
class LoRAVelocity:
    """A velocity whose net runs with one adapter."""

    velocity: Velocity
    role: str | None

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        with use_role(self.role):
            return self.velocity(x_t, t, cond)


class LoRARoles:
    """Several LoRA adapters in the linear layers of a net. The net is changed in place, its weights frozen.

    Args:
        net: any torch module; its weights keep their precision.
        names: the adapters.
        rank: rank of every ``A`` and ``B``.
        alpha: the update is scaled by ``alpha / rank``; by default 1.
        targets: ends of the names of the linear layers, such as ``to_q`` or ``ff.net.2``. A layer of the net
            itself, outside all blocks, is never one. A family names its own (``lora_targets``).
        seed: seed of every ``A``; adapters differ.

    Attributes:
        scale: ``alpha / rank``.

    Raises:
        ValueError: no layer has such a name, the rank is not positive, or the net has adapters already.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str] = ("student", "proxy"),
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str],
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"a rank of {rank}")
        self.body, self.names = net, tuple(names)
        self.scale = (rank if alpha is None else alpha) / rank
        ends = tuple(f".{target}" for target in targets)
        self._linears: dict[str, nn.Linear] = {
            path: layer
            for path, layer in net.named_modules()
            if isinstance(layer, nn.Linear) and path.endswith(ends)
        }
        if not self._linears or any(hasattr(layer, ADAPTERS) for layer in self._linears.values()):
            raise ValueError(f"no linear layer without adapters ends in {', '.join(targets)}")
        net.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for layer in self._linears.values():
            adapters = {name: LoRALayer(layer, rank, generator) for name in self.names}
            layer.add_module(ADAPTERS, nn.ModuleDict(adapters))
            layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        role = _active
        if role is None:
            return out
        adapter = layer.get_submodule(ADAPTERS).get_submodule(role)
        return out + (self.scale * adapter(args[0])).to(out.dtype)

    def velocity(self, name: str | None, velocity: Velocity) -> Velocity:
        """Return the net's velocity with an adapter; ``None`` is the base, the teacher.

        Args:
            name: the adapter.
            velocity: the family's velocity of the net.
        """
        self._check(name)
        return LoRAVelocity(velocity, name)

    def net(self, name: str) -> LoRAParameters:
        """Return the weights of one adapter, and no others, as the module that a method trains."""
        return LoRAParameters(self.layers(name))

    def layers(self, name: str) -> dict[str, LoRALayer]:
        """Return the layers of one adapter by the names of the linear layers that they adapt."""
        self._check(name)
        return {
            path: cast(LoRALayer, layer.get_submodule(ADAPTERS).get_submodule(name))
            for path, layer in self._linears.items()
        }

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """Return the state dict of the net with an adapter merged: ``W + scale B A``, in the base's
        precision."""
        plain = {key: v for key, v in self.body.state_dict().items() if f".{ADAPTERS}." not in key}
        for path, layer in self.layers(name).items():
            key = f"{path}.weight"
            plain[key] = (plain[key].float() + self.scale * layer.b.detach() @ layer.a.detach()).to(
                plain[key].dtype
            )
        return plain

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ValueError(f"{name} is none of the adapters {', '.join(self.names)}")
