"""Blocks that need less memory, or less time (floor 2, torch).

Both replace a block's ``forward`` and nothing else: names and values of its weights, and the hooks around
it (taps of features, shards), stay as they are. Where both are wanted, :func:`compile_block` comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fewstep.modules.lora import active_role, use_role


def checkpoint_activations(block: Any) -> None:
    """Let the backward pass compute the block's inner values anew instead of keeping them."""
    block.forward = partial(_run, block.forward)


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    role = active_role()  # by the time of the backward pass another may have acted
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), use_role(role)), **kwargs
    )


def compile_block(block: Any, backend: str = "inductor", dynamic: bool | None = None) -> None:
    """Compile the block; blocks of one class and shape share what was compiled.

    Args:
        block: the module, changed in place.
        backend: torch's name of it.
        dynamic: leave sizes open from the start; ``None`` is torch's own way, when they change.
    """
    # One version a role, with and without gradient, and a class has blocks of several kinds (the last, those
    # with two attentions): torch would stop at eight.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateUsage]
    block.forward = torch.compile(block.forward, backend=backend, dynamic=dynamic)
