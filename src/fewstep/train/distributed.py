"""Several processes: torchrun's environment, sharded nets, and what all of them must agree on.

A run's bodies are sharded (FSDP2): each process holds an equal part of every weight, gathers a block's when
the block runs and lets them go after. What is in no body (heads, a codec) is held whole by each process, and
its gradients are averaged. One process does neither.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fewstep.core.types import UserError
from fewstep.train.run import ParallelModule


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun numbers them.

    Attributes:
        rank: this process.
        size: how many there are.
        local: this process among those of its machine: its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


@cache
def world() -> World:
    """What torchrun's environment says; without it, one process."""
    told = [int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]  # fmt: skip
    return World(*told)


def init_distributed(device: str) -> World:
    """Meet the other processes, where there are any: gloo between CPUs, NCCL between GPUs."""
    import torch.distributed as dist

    here = world()
    if here.size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(shutdown)  # not after a run: the next one of a chain meets the same processes
    return here


def shutdown() -> None:
    """Part from the other processes."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(action: Callable[[], Any]) -> Any:
    """What the first process does, and its result or its ``UserError`` is everyone's."""
    if world().size == 1:
        return action()
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if world().first:
        try:
            told[0] = action()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


def all_reduce_any(asked: Sequence[bool]) -> list[bool]:
    """For each question, whether any process says yes."""
    return [bool(most) for most in largest(asked)]


def largest(numbers: Sequence[float]) -> list[float]:
    """The largest of each number over the processes."""
    if world().size == 1:
        return list(numbers)
    return _reduced(list(map(float, numbers)), "MAX")


def means(figures: Mapping[str, float]) -> dict[str, float]:
    """Means over the processes; all have the same names in the same order."""
    if world().size == 1:
        return dict(figures)
    sums = _reduced(list(figures.values()), "SUM")
    return {name: total / world().size for name, total in zip(figures, sums, strict=True)}


def total(number: float) -> float:
    """Sum over the processes."""
    return number if world().size == 1 else _reduced([number], "SUM")[0]


def _reduced(numbers: list[float], how: str) -> list[float]:
    import torch
    import torch.distributed as dist

    held = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: gloo carries it
    dist.all_reduce(held, getattr(dist.ReduceOp, how))
    return held.tolist()


def shard(bodies: Iterable[ParallelModule], device: str, half: bool) -> None:
    """Shard every block of the bodies, then what is left of each, over all processes.

    Weights stay what they are (float32 masters); in half precision blocks are gathered as bf16, which halves
    the traffic, and gradients are summed in float32.
    """
    if world().size == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (world().size,))
    # Inputs are not cast: a time in bf16 has no 749.25. Autocast rounds where it multiplies.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for body in bodies:
        for part in (*body.blocks, body.net):
            # Always let go after the forward pass, the root too: weights are frozen and thawed between turns,
            # and what is frozen must be the shards.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # At its first call a net settles in which precision its gradients come, and for a net that is frozen
        # just then it settles none: let it be now, while it may learn.
        body.net._get_fsdp_state()._lazy_init()


def set_gradient_sync(bodies: Iterable[ParallelModule], held: bool) -> None:
    """Whether gradients of sharded nets wait for a later micro-batch before processes exchange them."""
    if world().size > 1:
        for body in bodies:
            body.net.set_requires_gradient_sync(not held)


def full_tensor(tensor: Any) -> Any:
    """The whole of a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(net: Any) -> dict[str, Any]:
    """A state dict, whole and on the CPU in the first process, empty elsewhere; every process must ask."""
    told: dict[str, Any] = {}
    for name, tensor in net.state_dict().items():
        full = full_tensor(tensor.detach())
        if world().first:
            told[name] = full.cpu().contiguous()
    return told


def broadcast_weights(nets: Iterable[Any]) -> None:
    """Give every process the first one's weights and buffers, where they are not sharded."""
    import torch.distributed as dist

    if world().size > 1:
        for net in nets:
            for tensor in (*net.parameters(), *net.buffers()):
                if not hasattr(tensor, "full_tensor"):
                    dist.broadcast(tensor.data, 0)


def average_gradients(parameters: Iterable[Any]) -> None:
    """Average the gradients of parameters that are not sharded; FSDP has done so for the others."""
    import torch
    import torch.distributed as dist

    mine = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
    if world().size == 1 or not mine:
        return
    flat = torch.cat([gradient.flatten() for gradient in mine])
    dist.all_reduce(flat)
    flat /= world().size
    for gradient, piece in zip(mine, flat.split([g.numel() for g in mine]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def unshard(bodies: Iterable[ParallelModule]) -> None:
    """Make nets plain torch modules again, for good: whole and on the CPU in the first process alone."""
    if world().size == 1:
        return
    import torch

    for body in bodies:
        for module in list(body.net.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = full_tensor(parameter.detach())
                kept = full.cpu() if world().first else full.new_empty(0)
                setattr(module, name, torch.nn.Parameter(kept, parameter.requires_grad))
        for part in (*body.blocks, body.net):
            _plain(part)
        body.net.cpu()


def _plain(part: Any) -> None:
    """Take FSDP's hooks and class off a module; torch offers no public way back."""
    state = part._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
    state._pre_forward_hook_handle.remove()  # pyright: ignore[reportPrivateUsage]
    state._post_forward_hook_handle.remove()  # pyright: ignore[reportPrivateUsage]
    part.__class__ = type(part).__mro__[2]
