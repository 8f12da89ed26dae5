"""Activation checkpointing and compilation of transformer blocks.

Both replace a block's ``forward`` alone. Names and values of its weights, and hooks on it, stay. To use both,
call :func:`compile_block` first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from fewstep.modules.lora import active_role, use_role

P = ParamSpec("P")
T = TypeVar("T")


def checkpoint_activations(block: torch.nn.Module) -> None:
    """Compute the block's activations again in the backward pass instead of keeping them."""
    block.forward = partial(_run, block.forward)


def _run(forward: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    role = active_role()  # another may be active by the backward pass
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use_role(role)), **kwargs
    )


def compile_block(block: torch.nn.Module, backend: str = "inductor", dynamic: bool | None = None) -> None:
    """Compile a block. Blocks of one class and shape share the compiled code.

    Args:
        block: the module, changed in place.
        backend: name of the backend.
        dynamic: compile for dynamic shapes at once; ``None`` does so when a shape changes.
    """
    # One version per adapter, with and without gradient, for each kind of block (the last, those with two
    # attentions): torch would stop at eight.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage]
    block.forward = torch.compile(block.forward, backend=backend, dynamic=dynamic)
