"""What a run is at a step, and how it takes the next one: zero, backward, clip and step happen here alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from fewstep.core.types import WHOLE, BatchSlice, UserError
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.modules.ema import EMA
from fewstep.train import distributed
from fewstep.train.checkpoint import restore
from fewstep.train.device import attention, resolve_device, to_device, use_bf16
from fewstep.train.optim import adamw, clip, schedule
from fewstep.train.run import ParallelModule, Run


class State:
    """Nets, their averages, their optimizers and the step: all that a checkpoint holds."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = resolve_device(run.options.device)
        self.half = use_bf16(run.options.precision, self.device)
        self.world = distributed.init_distributed(self.device)
        self.nets: dict[str, Any] = dict(run.method.nets)
        self.bodies = list({id(body.net): body for body in run.bodies}.values())
        for net in self.nets.values():
            net.to(self.device).train().requires_grad_(True)
        _prepare(self.bodies, run, self.device)
        distributed.shard(self.bodies, self.device, self.half)
        distributed.broadcast_weights(self.nets.values())
        self.optimizers = {name: adamw(net, run.options) for name, net in self.nets.items()}
        kept = self.nets if run.averaged is None else run.averaged
        self.averages = {
            name: EMA(dict(self.nets[name].named_parameters()), run.options.ema) for name in kept
        }
        self.step = restore(run.folder, self.all(), run.record)

    def all(self) -> dict[str, Any]:
        """What is saved and restored, by name."""
        return {"nets": self.nets, "optimizers": self.optimizers, "averages": self.averages}

    @contextmanager
    def averaged(self) -> Generator[dict[str, Any]]:
        """Within the block the nets, in eval mode and without gradients, are their averages."""
        import torch

        shown = list(self.averages.values())
        # What is drawn for a sheet has a size of its own: not worth a compilation.
        eager = torch.compiler.set_stance("force_eager")
        with eager, _all_of([a.applied for a in shown]), torch.no_grad(), self._autocast(sharded=True):
            for net in self.nets.values():
                net.eval()
            try:
                yield self.nets
            finally:
                for net in self.nets.values():
                    net.train()

    def finished(self) -> dict[str, Any]:
        """The nets, in eval mode, as their averages for good; whole again in the first process."""
        for average in self.averages.values():
            average.copy_to_model()
        distributed.unshard(self.bodies)
        return {name: net.eval() for name, net in self.nets.items()}

    def train_step(self) -> dict[str, float]:
        """One step: every turn of the method on the batch of this step. Returns what the log shall know."""
        options = self.run.options
        rate, shares = schedule(self.step, options), self._shares()
        pieces = [(share, to_device(self.run.batches(self.step, share), self.device)) for share in shares]
        figures: dict[str, float] = {}
        for number, turn in enumerate(self.run.method.updates(self.step)):
            if isinstance(turn, InPlaceUpdate):
                self._change(turn, draw(options.seed, self.step, number))
            else:
                figures |= self._take(turn, number, pieces, rate)
        self.step += 1
        return {"lr": rate * options.lr} | distributed.means(figures)

    def _shares(self) -> list[BatchSlice]:
        """This process's micro-batches."""
        many, rank = self.run.options.gradient_accumulation_steps, self.world.rank
        return [BatchSlice(rank * many + k, self.world.size * many) for k in range(many)]

    def _take(
        self, turn: Update, number: int, pieces: Sequence[tuple[BatchSlice, Any]], rate: float
    ) -> dict[str, float]:
        net, optimizer = self.nets[turn.net], self.optimizers[turn.net]
        for group in optimizer.param_groups:
            group["lr"] = rate * self.run.options.net_lrs.get(turn.net, self.run.options.lr)
        self._thaw(net)
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for share, batch in pieces:
            distributed.set_gradient_sync(self.bodies, share is not pieces[-1][0])
            for name, value in self._backward(turn, batch, number, share, len(pieces)).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        distributed.average_gradients(net.parameters())
        norm = clip(net.parameters(), self.run.options.clip)
        if not math.isfinite(norm):
            raise UserError(
                f"step {self.step}: the gradient of {turn.net} is not finite; the run diverged. "
                f"Lower --lr; the last checkpoint in {self.run.folder} still resumes"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # what other turns need the room for
        if turn.net in self.averages:
            self.averages[turn.net].update()
        return {name: total / len(pieces) for name, total in sums.items()} | {f"norm/{turn.net}": norm}

    def _thaw(self, net: Any) -> None:
        """Let this net alone have gradients: a loss may pass through the others, but leaves nothing there.

        Roles of one base are told apart by their parameters: the module that runs is the same.
        """
        own = {id(p) for p in net.parameters()}
        for other in self.nets.values():
            for parameter in other.parameters():
                parameter.requires_grad_(id(parameter) in own)

    def _backward(self, turn: Update, batch: Any, number: int, share: BatchSlice, many: int) -> Losses:
        """The gradient of one micro-batch's losses, as its part of their mean."""
        import torch

        randomness = draw(self.run.options.seed, self.step, number, share, self.device)
        # What a net draws for itself (dropout) is a function of the step, too.
        torch.manual_seed(int(np.random.SeedSequence([self.step, number, share.part]).generate_state(1)[0]))
        # The kernel of attention is chosen for the backward pass as well: it may compute blocks anew.
        with attention(self.device, self.run.options.tokens):
            with self._autocast():
                losses = turn.losses(batch, randomness)
            loss = _total(losses)
            (loss if many == 1 else loss / many).backward()
        return losses

    def _change(self, change: InPlaceUpdate, randomness: StepRandom) -> None:
        import torch

        with torch.no_grad():
            for parameter in change.apply(randomness):
                self.optimizers[change.net].state.pop(parameter, None)

    def _autocast(self, sharded: bool = False) -> AbstractContextManager[Any]:
        """bf16 where the run has it; ``sharded``: only where nets are gathered in bf16."""
        import torch

        wanted = self.half and (not sharded or self.world.size > 1)
        return torch.autocast(self.device, torch.bfloat16, enabled=wanted)


def draw(seed: int, step: int, turn: int, share: BatchSlice = WHOLE, device: str = "cpu") -> StepRandom:
    """The randomness of one turn, for one share of its batch; its noise is drawn on ``device``."""
    import torch

    key = np.random.SeedSequence([seed, step, turn])
    generator = torch.Generator(device)
    generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return StepRandom(np.random.Generator(np.random.Philox(key)), generator, share)


def _prepare(bodies: Sequence[ParallelModule], run: Run, device: str) -> None:
    """Compile and recompute blocks where the options say so."""
    from fewstep.modules.block_transforms import checkpoint_activations, compile_block

    if (run.options.compile or run.options.activation_checkpointing) and not bodies:
        raise UserError(f"{run.name} names no blocks to compile or to recompute")
    for body in bodies:
        body.net.to(device)
        for block in body.blocks:
            if run.options.compile:
                compile_block(block)
            if run.options.activation_checkpointing:
                checkpoint_activations(block)


def _total(losses: Mapping[str, Any]) -> Any:
    learnt = [value for value in losses.values() if value.requires_grad]
    return sum(learnt[1:], start=learnt[0])


@contextmanager
def _all_of(blocks: Sequence[Callable[[], AbstractContextManager[None]]]) -> Generator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block())
        yield
