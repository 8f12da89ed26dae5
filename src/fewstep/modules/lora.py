"""LoRA roles (floor 2, torch): one frozen base is teacher, student and proxy.

``y = W x + (alpha / rank) B A x`` (Hu et al., arXiv 2106.09685) with an ``A`` and a ``B`` for each role, and
``W`` held once. Which role acts is said around each call of the net: all of them are velocities side by side.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.atomic import replacing_file
from fewstep.core.types import Array, Cond, UserError, Velocity
from fewstep.families.lora.alpha import FILE
from fewstep.families.lora.file import read, tensor_of

PREFIX = "transformer."
HELD = "roles"
"""The name under which an adapted layer holds its roles."""

_actor: str | None = None


def active_role() -> str | None:
    """The role that acts now; ``None`` is the base alone."""
    return _actor


@contextmanager
def use_role(role: str | None) -> Generator[None]:
    """Within the block, nets with roles act this one.

    One variable of the process and not of the thread: the backward pass, which may compute a block anew, has
    threads of its own.
    """
    global _actor
    before, _actor = _actor, role
    try:
        yield
    finally:
        _actor = before


class LoRALayer(nn.Module):
    """``B A x``: ``[..., in] -> [..., out]`` through ``rank``; nought at first. Float32."""

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
    """A role's own weights, as a net: what an optimizer, an average and a checkpoint see of it."""

    def __init__(self, lows: Mapping[str, LoRALayer]) -> None:
        super().__init__()
        for path, low in lows.items():
            self.add_module(path.replace(".", "-"), low)


@dataclass(frozen=True)
class LoRAVelocity:
    """A velocity whose net acts one role."""

    velocity: Velocity
    role: str | None

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        with use_role(self.role):
            return self.velocity(x_t, t, cond)


class LoRARoles:
    """Roles of a net, each a LoRA in its linear layers. The net is changed in place, its own weights frozen.

    Args:
        net: any torch module; its weights keep their precision.
        names: the roles.
        rank: of every ``A`` and ``B``.
        alpha: the update is scaled by ``alpha / rank``; by default 1.
        targets: ends of the names of the linear layers, such as ``to_q`` or ``ff.net.2``; a layer of the net
            itself, in no block, is never one. A family names its own (``TARGETS``).
        seed: of every ``A``; roles differ.

    Raises:
        ValueError: no layer has such a name, the rank is not positive, or the net has roles already.
    """

    def __init__(
        self,
        net: Any,
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
        if not self._linears or any(hasattr(layer, HELD) for layer in self._linears.values()):
            raise ValueError(f"no linear layer without roles ends in {', '.join(targets)}")
        net.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self._hooks: list[Any] = []
        for layer in self._linears.values():
            lows = {name: LoRALayer(layer, rank, generator) for name in self.names}
            layer.add_module(HELD, nn.ModuleDict(lows))
            self._hooks.append(layer.register_forward_hook(self._add))

    def _add(self, layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        role = _actor
        if role is None:
            return out
        return out + (self.scale * layer.get_submodule(HELD).get_submodule(role)(args[0])).to(out.dtype)

    def velocity(self, name: str | None, velocity: Velocity) -> Velocity:
        """The net's velocity (the family's adapter of it) in a role; ``None`` is the base: the teacher."""
        self._check(name)
        return LoRAVelocity(velocity, name)

    def net(self, name: str) -> LoRAParameters:
        """The weights of one role, and no others, as a net: what a method names and a trainer trains."""
        return LoRAParameters(self._lows(name))

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """The whole net in this role as a plain state dict: ``W + scale B A``, in the base's precision."""
        lows = self._lows(name)
        plain = {key: v for key, v in self.body.state_dict().items() if f".{HELD}." not in key}
        for path, low in lows.items():
            key = f"{path}.weight"
            plain[key] = (plain[key].float() + self.scale * low.b.detach() @ low.a.detach()).to(
                plain[key].dtype
            )
        return plain

    def merge_and_unload(self, name: str) -> Any:
        """Make the net this role, plain again and without any roles; it cannot act another afterwards."""
        merged = self.merged(name)
        for hook in self._hooks:
            hook.remove()
        for layer in self._linears.values():
            delattr(layer, HELD)
        self.body.load_state_dict(merged)
        return self.body

    def save(self, name: str, folder: Path) -> Path:
        """Write the role as a LoRA that diffusers' ``load_lora_weights(folder)`` reads.

        The scale goes into ``B``, so that readers need no ``alpha``.

        Raises:
            UserError: the disk refuses.
        """
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for path, low in self._lows(name).items():
            tensors[f"{PREFIX}{path}.lora_A.weight"] = low.a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = (self.scale * low.b.detach()).cpu().contiguous()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(folder / FILE) as fresh:
                save_file(tensors, fresh, {"format": "pt"})
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise UserError(f"{folder / FILE} could not be written ({error})") from error
        return folder / FILE

    @torch.no_grad()
    def load(self, name: str, folder: Path) -> None:
        """Read a role that :meth:`save` wrote, or another LoRA of the same layers and rank.

        Its own scale, wherever it stands, and this net's go into ``B``.

        Raises:
            UserError: it is not there, broken, or of another net, rank or choice of layers.
        """
        path = folder / FILE
        try:
            factors = {each.name: each for each in read(path).factors if each.part == PREFIX[:-1]}
        except UserError as error:
            raise UserError(f"{path} cannot be read as a LoRA ({error})") from error
        lows = self._lows(name)
        wanted = {at: ((low.b.shape[0], low.a.shape[1]), low.a.shape[0]) for at, low in lows.items()}
        if {at: (each.shape, each.rank) for at, each in factors.items()} != wanted:
            raise UserError(f"{path} is a LoRA of other layers or of another rank than this run's")
        for at, low in lows.items():
            low.a.copy_(tensor_of(path, factors[at].down))
            low.b.copy_(tensor_of(path, factors[at].up).float() * factors[at].scale / self.scale)

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ValueError(f"{name} is none of the roles {', '.join(self.names)}")

    def _lows(self, name: str) -> dict[str, Any]:
        self._check(name)
        return {p: layer.get_submodule(HELD).get_submodule(name) for p, layer in self._linears.items()}
