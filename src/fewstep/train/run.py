"""The trainer: turns, optimizers, averages, checkpoints and logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.types import BatchSlice, UserError
from fewstep.methods.base import Method


@dataclass(frozen=True)
class TrainOptions:
    """How a run is trained, whatever it trains.

    Attributes:
        steps: updates in all.
        lr: learning rate of AdamW after the warm-up.
        net_lrs: learning rates of nets that have one of their own, by name.
        warmup: steps in which the rate rises from zero.
        decay: share of the steps, the last ones, in which it falls to zero.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of a gradient.
        ema: decay of the averaged weights, which are what is kept.
        seed: of data order, noise and times.
        save_minutes: minutes between checkpoints.
        preview_every: steps between contact sheets; 0 makes none.
        log_every: steps between log lines.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU where there is one.
        precision: ``fp32``, ``bf16`` (autocast; weights stay fp32), or ``auto``: bf16 where the device
            multiplies it faster, a GPU or a CPU with a unit for it. Elsewhere it is slower than fp32.
        threads: torch threads on a CPU; 0 leaves torch's choice.
        tokens: length of the longest sequence that a net attends to, where it is known, else 0.
        gradient_accumulation_steps: micro-batches a batch: each process holds the activations of one at a
            time.
        activation_checkpointing: compute inner values of the bodies' blocks anew in the backward pass
            instead of keeping
            them: less memory, a third more time.
        compile: compile the bodies' blocks.
        validate_every: steps between scores (see :class:`Run`); 0 scores at the end alone.
        detect_divergence: whether figures that leave their bounds (:mod:`fewstep.train.divergence`) stop the
            run.
        max_minutes: do as many steps as fit into so many minutes, at most ``steps``; settled once the speed
            is known (:data:`fewstep.train.trainer.SETTLED`), while the rate is still level. 0 does ``steps``.

    Raises:
        UserError: a value out of its range.
    """

    steps: int
    lr: float
    net_lrs: Mapping[str, float] = field(default_factory=dict[str, float])
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_minutes: float = 3.0
    preview_every: int = 0
    log_every: int = 20
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    tokens: int = 0
    gradient_accumulation_steps: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    validate_every: int = 0
    detect_divergence: bool = True
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps < 1:
            raise UserError(
                f"--gradient-accumulation-steps must be at least 1, not {self.gradient_accumulation_steps}"
            )
        if self.steps < 1:
            raise UserError("--steps must be at least 1")
        counted_threads(self.threads)
        if not 0 <= self.max_minutes < 1e6:
            raise UserError(f"--max-minutes must be a number of at least 0, not {self.max_minutes}")
        for rate in (self.lr, *self.net_lrs.values()):
            if not (isfinite(rate) and rate > 0):
                raise UserError(f"--lr must be a positive number, not {rate}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must lie between 0 and {2**31 - 1}, not {self.seed}")


class ParallelModule(Protocol):
    """A torch module that runs, and its blocks: where to shard, compile and recompute. A family is one."""

    @property
    def net(self) -> Any: ...

    @property
    def blocks(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Run:
    """All that a training run is: recipes return it, :func:`fewstep.train.trainer.train` carries it out.

    Attributes:
        name: the recipe's name.
        folder: where checkpoints, log and sheets go.
        method: what is learnt.
        batches: (step, share) -> that part of the step's batch; a pure function, so the step is all it needs.
        options: how.
        record: resolved options and sources, written into the folder.
        averaged: the nets whose averages are kept, by name; all where it is ``None``. What is not averaged is
            handed on as it is.
        preview: averaged nets -> a contact sheet (a Pillow image).
        finish: averaged nets -> writes what the run is for (a diffusers folder, say). Called last, by one
            process, when the nets are whole again and need not learn any more.
        bodies: the modules that run, frozen ones too: those that hold the nets' weights, and a teacher. A net
            in none of them is neither sharded nor compiled nor recomputed.
        score: averaged nets -> how good they are; the best ones are kept
            (:mod:`fewstep.train.best_checkpoint`).
        metric: what the score is called.
        higher: whether the higher score is the better.
    """

    name: str
    folder: Path
    method: Method
    batches: Callable[[int, BatchSlice], Any]
    options: TrainOptions
    record: dict[str, Any]
    averaged: Sequence[str] | None = None
    preview: Callable[[dict[str, Any]], Any] | None = None
    finish: Callable[[dict[str, Any]], None] | None = None
    bodies: Sequence[ParallelModule] = ()
    score: Callable[[dict[str, Any]], float] | None = None
    metric: str = "score"
    higher: bool = False
