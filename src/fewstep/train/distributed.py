"""Training in several processes: torchrun's environment, FSDP2 and collectives.

A run's bodies are sharded with FSDP2: each process stores an equal part of every weight, and gathers those of
a block only while it runs. Nets in no body, such as heads, are replicated, and their gradients are
averaged. A single process does neither.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fewstep.core.types import UserError
from fewstep.train.run import ParallelModule

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor import DTensor
    from torch.nn import Module


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun numbers them.

    Attributes:
        rank: index of this process.
        size: number of processes.
        local: this process among those of its machine; also the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


@cache
def world() -> World:
    """Return the processes that torchrun's environment names; without it, this one alone."""
    values = [int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]  # fmt: skip
    return World(*values)


def init_distributed(device: str) -> World:
    """Join the process group, if there are several processes: gloo between CPUs, NCCL between GPUs."""
    import torch.distributed as dist

    here = world()
    if here.size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(shutdown)  # not after a run: the next one of a chain uses the same group
    return here


def shutdown() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run an action in the first process; return its result, or raise its ``UserError``, in all."""
    if world().size == 1:
        return action()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if world().first:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def all_reduce_any(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set in any process."""
    return [bool(flag) for flag in largest(flags)]


def largest(numbers: Sequence[float]) -> list[float]:
    """Return the maximum of each number over the processes."""
    if world().size == 1:
        return list(numbers)
    return _reduced(list(map(float, numbers)), "MAX")


def means(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the means over the processes; all have the same names in the same order."""
    if world().size == 1:
        return dict(figures)
    sums = _reduced(list(figures.values()), "SUM")
    return {name: total / world().size for name, total in zip(figures, sums, strict=True)}


def total(number: float) -> float:
    """Return the sum over the processes."""
    return number if world().size == 1 else _reduced([number], "SUM")[0]


def _reduced(numbers: list[float], operation: str) -> list[float]:
    import torch
    import torch.distributed as dist

    values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, where gloo reduces
    dist.all_reduce(values, getattr(dist.ReduceOp, operation))
    return values.tolist()


def shard(bodies: Iterable[ParallelModule], device: str, half: bool) -> None:
    """Shard every block of the bodies, then the rest of each body, over all processes.

    Weights stay in float32. In half precision blocks are gathered as bf16, which halves the traffic, and
    gradients are summed in float32.
    """
    if world().size == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (world().size,))
    # Inputs are not cast: bf16 cannot hold a time such as 749.25. Autocast rounds only for products.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for body in bodies:
        for part in (*body.blocks, body.net):
            # Always reshard after the forward pass, the root too: requires_grad changes between updates, and
            # it must be set on the shards.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # FSDP fixes the gradients' precision at the first call, and fixes none for a net that is frozen then.
        # So initialise now, while the weights are trainable.
        body.net._get_fsdp_state()._lazy_init()


def set_gradient_sync(bodies: Iterable[ParallelModule], deferred: bool) -> None:
    """Set whether sharded nets exchange gradients only after a later micro-batch."""
    if world().size > 1:
        for body in bodies:
            body.net.set_requires_gradient_sync(not deferred)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded; every process must call this."""
    return cast("DTensor", tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(net: Module) -> dict[str, Tensor]:
    """Return a state dict, unsharded on the CPU of the first process, empty elsewhere; all must call this."""
    state: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        full = full_tensor(tensor.detach())
        if world().first:
            state[name] = full.cpu().contiguous()
    return state


def broadcast_weights(nets: Iterable[Module]) -> None:
    """Give every process the first one's weights and buffers, unless they are sharded."""
    import torch.distributed as dist

    if world().size > 1:
        for net in nets:
            for tensor in (*net.parameters(), *net.buffers()):
                if not hasattr(tensor, "full_tensor"):
                    dist.broadcast(tensor.data, 0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of parameters that are not sharded; FSDP has done so for the others."""
    import torch
    import torch.distributed as dist

    gradients = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
    if world().size == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world().size
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def unshard(bodies: Iterable[ParallelModule]) -> None:
    """Turn sharded nets back into plain torch modules, with weights on the CPU of the first process alone."""
    if world().size == 1:
        return
    import torch

    for body in bodies:
        for module in list(body.net.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = full_tensor(parameter.detach())
                value = full.cpu() if world().first else full.new_empty(0)
                setattr(module, name, torch.nn.Parameter(value, parameter.requires_grad))
        for part in (*body.blocks, body.net):
            _plain(part)
        body.net.cpu()


def _plain(part: Any) -> None:
    """Remove FSDP's hooks and class from a module; torch has no public function for it."""
    state = part._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
    state._pre_forward_hook_handle.remove()  # pyright: ignore[reportPrivateUsage]
    state._post_forward_hook_handle.remove()  # pyright: ignore[reportPrivateUsage]
    part.__class__ = type(part).__mro__[2]
