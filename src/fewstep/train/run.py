"""A training run: its method, its batches, its options and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fewstep.core.cpu import threads as check_threads
from fewstep.core.types import BatchSlice, UserError
from fewstep.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run, whatever it trains.

    Attributes:
        steps: training steps.
        lr: learning rate of AdamW after the warm-up.
        net_lrs: learning rates of single nets, by name; they override ``lr``.
        warmup: share of the steps, at the start, in which the learning rate rises from zero.
        decay: share of the steps, at the end, in which it falls to zero.
        betas: of AdamW.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of a gradient.
        ema: decay of the averaged weights, which are the result.
        seed: of data order, noise and times.
        save_minutes: minutes between checkpoints.
        preview_every: steps between contact sheets; 0 makes none.
        keep_every: steps between copies of the EMA nets that :attr:`Run.keep` writes; 0 writes none. The last
            step has one, too.
        log_every: steps between log lines.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if there is one.
        precision: ``fp32``, ``bf16`` (autocast; weights stay fp32), or ``auto``: bf16 on a GPU or a CPU with
            bf16 units, fp32 elsewhere.
        threads: torch threads on a CPU; 0 leaves torch's choice.
        tokens: length of the longest sequence in attention; 0 if unknown.
        gradient_accumulation_steps: micro-batches per batch; each process holds the activations of one at a
            time.
        activation_checkpointing: recompute activations of the bodies' blocks in the backward pass: less
            memory, a third more time.
        compile: compile the bodies' blocks.
        validate_every: steps between scores (see :class:`Run`); 0 scores only at the end.
        detect_divergence: whether figures out of bounds (:mod:`fewstep.train.divergence`) stop the run.
        max_minutes: train for at most this many minutes, and at most ``steps`` steps. The number of steps is
            fixed once the speed is known (:class:`fewstep.train.trainer.TimeBudget`). 0 sets no limit.

    Raises:
        UserError: a value is out of its range.
    """

    steps: int
    lr: float
    net_lrs: Mapping[str, float] = field(default_factory=dict[str, float])
    warmup: float = 0.05
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    save_minutes: float = 3.0
    preview_every: int = 0
    keep_every: int = 0
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
        check_threads(self.threads)
        if not 0 <= self.max_minutes < 1e6:
            raise UserError(f"--max-minutes must be a number of at least 0, not {self.max_minutes}")
        for rate in (self.lr, *self.net_lrs.values()):
            if not (isfinite(rate) and rate > 0):
                raise UserError(f"--lr must be a positive number, not {rate}")
        self._check_optimizer()
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must lie between 0 and {2**31 - 1}, not {self.seed}")

    def _check_optimizer(self) -> None:
        for option, share in (("warmup", self.warmup), ("decay", self.decay)):
            if not 0 <= share <= 1:
                raise UserError(f"--{option} is a share of the steps, from 0 to 1, not {share}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.ema)):
            raise UserError("--betas and --ema must be at least 0 and below 1")
        if not (self.clip > 0 and self.weight_decay >= 0):
            raise UserError("--clip must be above 0, and --weight-decay at least 0")


class ParallelModule(Protocol):
    """A torch module that runs, and its blocks, to be sharded, compiled and checkpointed. A family is one."""

    @property
    def net(self) -> Any: ...  # FSDP adds methods to the module

    @property
    def blocks(self) -> Sequence[Module]: ...


class SaveableImage(Protocol):
    """An image that can be saved; a Pillow image is one."""

    def save(self, fp: Path) -> None: ...


@dataclass(frozen=True)
class Run:
    """A training run: recipes return it, and :func:`fewstep.train.trainer.train` trains it.

    Attributes:
        name: the recipe's name.
        folder: of checkpoints, log and contact sheets.
        method: the training method.
        batches: training step and slice to that part of the step's batch; a pure function.
        options: the options.
        record: resolved options and sources, written to ``run.json``.
        averaged: names of the nets with an EMA; all of them if ``None``. Other nets are passed on as they
            are.
        preview: EMA nets to a contact sheet.
        keep: writes a copy of the EMA nets, given as state dicts by name, and the training step.
        finish: writes the result of the run from EMA nets, such as a diffusers folder. It is called last, by
            the first process, when the nets are unsharded.
        bodies: the modules that run, frozen ones too: those that hold the nets' weights, and a teacher. A net
            in none of them is neither sharded nor compiled nor checkpointed.
        score: EMA nets to a number; the best nets are kept (:mod:`fewstep.train.best_checkpoint`).
        metric: name of the score.
        higher: whether a higher score is better.
    """

    name: str
    folder: Path
    method: Method
    batches: Callable[[int, BatchSlice], object]
    options: TrainOptions
    record: dict[str, Any]
    averaged: Sequence[str] | None = None
    preview: Callable[[dict[str, Module]], SaveableImage] | None = None
    keep: Callable[[Mapping[str, Mapping[str, Tensor]], int], None] | None = None
    finish: Callable[[dict[str, Module]], None] | None = None
    bodies: Sequence[ParallelModule] = ()
    score: Callable[[dict[str, Module]], float] | None = None
    metric: str = "score"
    higher: bool = False
