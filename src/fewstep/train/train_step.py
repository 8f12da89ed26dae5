"""The state of a run and its training step: only this file steps optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core.types import WHOLE, Batch, BatchSlice, UserError
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.modules.ema import EMA
from fewstep.train import distributed
from fewstep.train.checkpoint import TrainState, restore
from fewstep.train.device import attention, resolve_device, to_device, use_bf16
from fewstep.train.optim import adamw, clip, schedule
from fewstep.train.passes import PassCounter
from fewstep.train.run import ParallelModule, Run

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class State:
    """Nets, EMAs, optimizers and the number of training steps: all that a checkpoint holds."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = resolve_device(run.options.device)
        self.half = use_bf16(run.options.precision, self.device)
        self.world = distributed.init_distributed(self.device)
        self.nets: dict[str, Module] = dict(run.method.nets)
        self.bodies = list({id(body.net): body for body in run.bodies}.values())
        self._passes = PassCounter([body.net for body in self.bodies])
        for net in self.nets.values():
            net.to(self.device).train().requires_grad_(True)
        _transform_blocks(self.bodies, run, self.device)
        distributed.shard(self.bodies, self.device, self.half)
        distributed.broadcast_weights(self.nets.values())
        self.optimizers = {name: adamw(net, run.options) for name, net in self.nets.items()}
        averaged = self.nets if run.averaged is None else run.averaged
        self.averages = {
            name: EMA(dict(self.nets[name].named_parameters()), run.options.ema) for name in averaged
        }
        self.step = restore(run.folder, self.all(), run.record)

    def all(self) -> TrainState:
        """Return what a checkpoint holds, by name."""
        return {"nets": self.nets, "optimizers": self.optimizers, "averages": self.averages}

    @contextmanager
    def averaged(self) -> Generator[dict[str, Module]]:
        """Within the block the nets have their EMA weights, are in eval mode and without gradients."""
        import torch

        averages = list(self.averages.values())
        # Previews have batch sizes of their own, which are not worth a compilation.
        eager = torch.compiler.set_stance("force_eager")
        with eager, _all_of([a.applied for a in averages]), torch.no_grad(), self._autocast(sharded=True):
            for net in self.nets.values():
                net.eval()
            try:
                yield self.nets
            finally:
                for net in self.nets.values():
                    net.train()

    def finished(self) -> dict[str, Module]:
        """Return the nets with their EMA weights, in eval mode, unsharded in the first process."""
        for average in self.averages.values():
            average.copy_to_model()
        distributed.unshard(self.bodies)
        return {name: net.eval() for name, net in self.nets.items()}

    def train_step(self) -> dict[str, float]:
        """Apply all updates of the method to the batch of this step; return the figures for the log."""
        options = self.run.options
        factor, shares = schedule(self.step, options), self._shares()
        micro_batches = [
            (share, to_device(self.run.batches(self.step, share), self.device)) for share in shares
        ]
        figures: dict[str, float] = {}
        self._passes.take()  # drops those of previews
        for number, update in enumerate(self.run.method.updates(self.step)):
            if isinstance(update, InPlaceUpdate):
                self._apply(update, draw(options.seed, self.step, number))
            else:
                figures |= self._update(update, number, micro_batches, factor)
        self.step += 1
        rows = sum(len(batch.latents) for _, batch in micro_batches if isinstance(batch, Batch))
        if rows and self.bodies:
            figures["passes"] = self._passes.take() / rows
        return {"lr": factor * options.lr} | distributed.means(figures)

    def _shares(self) -> list[BatchSlice]:
        """Return the slices of this process's micro-batches."""
        count, rank = self.run.options.gradient_accumulation_steps, self.world.rank
        return [BatchSlice(rank * count + k, self.world.size * count) for k in range(count)]

    def _update(
        self, update: Update, number: int, micro_batches: Sequence[tuple[BatchSlice, object]], factor: float
    ) -> dict[str, float]:
        """Take one optimizer step; return its mean losses and the norm of its gradient."""
        net, optimizer = self.nets[update.net], self.optimizers[update.net]
        for group in optimizer.param_groups:
            group["lr"] = factor * self.run.options.net_lrs.get(update.net, self.run.options.lr)
        self._require_grad_of(net)
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for share, batch in micro_batches:
            distributed.set_gradient_sync(self.bodies, share is not micro_batches[-1][0])
            losses = self._backward(update, batch, number, share, len(micro_batches))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        distributed.average_gradients(net.parameters())
        norm = clip(net.parameters(), self.run.options.clip)
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step}: the gradient of {update.net} is not finite; the run diverged. "
                f"Lower --lr; the last checkpoint in {self.run.folder} still resumes"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # frees memory for the other updates
        if update.net in self.averages:
            self.averages[update.net].update()
        means = {name: total / len(micro_batches) for name, total in sums.items()}
        return means | {f"norm/{update.net}": norm}

    def _require_grad_of(self, net: Module) -> None:
        """Let only this net collect gradients; a loss may be differentiated through the others.

        Adapters of one net differ by their parameters, because the module that runs is the same.
        """
        own = {id(p) for p in net.parameters()}
        for other in self.nets.values():
            for parameter in other.parameters():
                parameter.requires_grad_(id(parameter) in own)

    def _backward(self, update: Update, batch: object, number: int, share: BatchSlice, parts: int) -> Losses:
        """Add the gradient of one micro-batch, one of ``parts``; return its losses."""
        import torch

        random = draw(self.run.options.seed, self.step, number, share, self.device)
        # A net's own randomness, such as dropout, is a function of the step, too.
        torch.manual_seed(int(np.random.SeedSequence([self.step, number, share.part]).generate_state(1)[0]))
        # The attention kernel is set for the backward pass, too: it may recompute blocks.
        with attention(self.device, self.run.options.tokens):
            with self._autocast():
                losses = update.losses(batch, random)
            loss = _total(losses)
            (loss if parts == 1 else loss / parts).backward()
        return losses

    def _apply(self, update: InPlaceUpdate, random: StepRandom) -> None:
        """Apply an update without gradient, and reset the optimizer state that it names."""
        import torch

        with torch.no_grad():
            for parameter in update.apply(random):
                self.optimizers[update.net].state.pop(parameter, None)

    def _autocast(self, sharded: bool = False) -> AbstractContextManager[object]:
        """Return autocast to bf16 if the run uses it; with ``sharded`` only if nets are gathered in bf16."""
        import torch

        enabled = self.half and (not sharded or self.world.size > 1)
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)


def draw(seed: int, step: int, update: int, share: BatchSlice = WHOLE, device: str = "cpu") -> StepRandom:
    """Return the randomness of one update, for one slice of its batch; noise is drawn on ``device``."""
    import torch

    key = np.random.SeedSequence([seed, step, update])
    generator = torch.Generator(device)
    generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return StepRandom(np.random.Generator(np.random.Philox(key)), generator, share)


def _transform_blocks(bodies: Sequence[ParallelModule], run: Run, device: str) -> None:
    """Compile and checkpoint blocks if the options say so."""
    from fewstep.modules.block_transforms import checkpoint_activations, compile_block

    if (run.options.compile or run.options.activation_checkpointing) and not bodies:
        raise UserError(f"{run.name} names no blocks to compile or to checkpoint")
    for body in bodies:
        body.net.to(device)
        for block in body.blocks:
            if run.options.compile:
                compile_block(block)
            if run.options.activation_checkpointing:
                checkpoint_activations(block)


def _total(losses: Losses) -> Tensor:
    """Return the sum of the losses that are not detached."""
    trained = [value for value in losses.values() if value.requires_grad]
    return sum(trained[1:], start=trained[0])


@contextmanager
def _all_of(blocks: Sequence[Callable[[], AbstractContextManager[None]]]) -> Generator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block())
        yield
