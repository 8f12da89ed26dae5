"""``fewstep estimate-memory``: the GPU memory of one training step of a distillation."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fewstep.core.optional import need
from fewstep.core.progress import say
from fewstep.core.types import UserError
from fewstep.core.validate import parse_bytes, require_at_least, require_positive
from fewstep.distill.dry_run import FakeSetup
from fewstep.distill.recipes import load_recipe
from fewstep.families.presets import read_spec
from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_plan import CONTEXT, FRAGMENTS

if TYPE_CHECKING:
    from fewstep.train.run import Run

GIB = 2**30
RANK = 64
"""Rank of LoRA adapters unless ``--lora`` is given."""

COLUMNS = ("frozen", "learning", "gradients", "optimizer", "averages", "activations")


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one configuration.

    Attributes:
        lora: rank of the LoRA adapters; 0 in full fine-tuning.
        checkpointed: whether activations are checkpointed.
        update: the net in whose update memory peaks.
        held: bytes of every kind at that peak.
        workspace: bytes of the workspaces of matrix products beside them.
        measured: ``torch.cuda.max_memory_allocated`` of a real step, where it was taken.
    """

    lora: int
    checkpointed: bool
    update: str
    held: dict[str, int]
    workspace: int
    measured: int | None = None

    @property
    def name(self) -> str:
        """The configuration in words."""
        training = f"LoRA {self.lora}" if self.lora else "full"
        return training + (", checkpointed" if self.checkpointed else "")

    @property
    def peak(self) -> int:
        """Most bytes that torch's allocator hands out."""
        return sum(self.held.values()) + self.workspace

    @property
    def card(self) -> float:
        """Bytes that the GPU must have."""
        return self.peak * (1 + FRAGMENTS) + CONTEXT


def estimate_memory(
    *,
    model: str = "sd3.5-medium",
    method: str = "flash",
    lora: int | None = None,
    activation_checkpointing: bool | None = None,
    size: int | None = None,
    batch_size: int = 1,
    student_steps: int = 4,
    memory: str = "24GiB",
    measure: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Print the peak memory of one training step; no GPU is needed.

    The recipe's own step runs on tensors that have shapes and no storage, and their bytes are counted. No
    weights are read. A configuration of SD3.5 Medium takes a minute or two. Captions and samples count as
    encoded before (`fewstep sample-teacher`).

    Args:
        model: sd3.5-medium, flux-dev, or a diffusers folder, of which only configurations are read.
        method: The distillation, by name or import path; of flash its second stage.
        lora: Rank of LoRA adapters; 0 is full fine-tuning. [default: 64 and 0, a line each]
        activation_checkpointing: Recompute the blocks in the backward pass. [default: with and without]
        size: Pixels along a side. [default: the model's own]
        batch_size: Samples per micro-batch.
        student_steps: Sampling steps of the student.
        memory: Of the GPU.
        measure: Also run a real step, with random weights, on the GPU of this machine.
    """
    require_positive(batch_size=batch_size, student_steps=student_steps)
    require_at_least(0, lora=lora or 0)
    load_recipe(method)
    need("torch", "diffusers", "transformers")
    shape, limit = read_spec(model), parse_bytes(memory)
    side = _side(shape, size)
    if measure:
        _require_gpu()
    config = FakeSetup(
        shape=shape,
        side=side,
        batch_size=batch_size,
        student_steps=student_steps,
        device="cpu",
        init="dry-run",
    )
    print(f"{shape.name}, {method}, {side} px, batch {batch_size}, a student of {student_steps} steps; GiB\n")
    measured = " measured |" if measure else ""
    print("| training | " + " | ".join(COLUMNS) + " | update | peak |" + measured)
    print("|---|" + "--:|" * len(COLUMNS) + "---|--:|" + ("--:|" if measure else ""))
    estimates: list[MemoryEstimate] = []
    for rank in (RANK, 0) if lora is None else (lora,):
        for checkpointed in (
            (True, False) if activation_checkpointing is None else (activation_checkpointing,)
        ):
            variant = replace(
                config,
                lora=rank,
                activation_checkpointing=checkpointed,
                dtype="bfloat16" if rank else "float32",
            )
            estimates.append(predict(method, variant, measure=measure))
            print(row(estimates[-1]), flush=True)
    print()
    for sentence in verdict(estimates, limit, shape, batch_size):
        print(sentence)


def predict(method: str, config: FakeSetup, *, gpu: bool = True, measure: bool = False) -> MemoryEstimate:
    """Return the memory of one configuration.

    Args:
        method: name or import path.
        config: the model and the options.
        gpu: as a GPU would hold it; otherwise as this CPU would, in float32.
        measure: run a real step, too.
    """
    import warnings

    from fewstep.modules.memory_tracker import WORKSPACE, fake_tensors
    from fewstep.train import memory

    estimate = MemoryEstimate(config.lora, config.activation_checkpointing, "", {}, WORKSPACE if gpu else 0)
    if sys.stderr.isatty():
        say(f"counting: {estimate.name}")
    with warnings.catch_warnings(), fake_tensors(gpu=gpu) as tracker:
        warnings.simplefilter("ignore")  # torch's, about fake tensors
        peaks = memory.profile_steps(fake_run(method, config, "bf16" if gpu else "fp32"), tracker)
    update, peak = max(peaks.items(), key=lambda pair: pair[1].total)
    estimate = replace(estimate, update=update, held=peak.held)
    if not measure:
        return estimate
    gc.collect()
    run = fake_run(method, replace(config, device="cuda"), "bf16")
    return replace(estimate, measured=memory.measure_steps(run))


def fake_run(method: str, config: FakeSetup, precision: str) -> Run:
    """Return the recipe's run without weights, in a folder that does not exist.

    The proxy is updated once per training step, because further updates need no more memory. Of a chain
    with a warm start and a split, the run is the stage between the two.
    """
    recipe = load_recipe(method)
    from fewstep.distill.matching import MatchingConfig

    once = {"proxy_updates": 1, "matching": MatchingConfig(proxy_updates=1)}
    shortened = {**once, "warm_start_steps": 0, "split_steps": 0}
    parameters = inspect.signature(recipe).parameters
    runs = recipe(config=config, **{name: value for name, value in shortened.items() if name in parameters})
    run = next(runs) if isinstance(runs, Iterator) else runs
    gc.collect()  # LoRA adapters and the layers that they hook refer to each other
    options = replace(run.options, precision=precision, tokens=0)
    return replace(run, folder=Path("dry-run"), options=options)


def row(estimate: MemoryEstimate) -> str:
    """Return an estimate as a line of the table."""
    cells = [f"{estimate.held[kind] / GIB:.2f}" for kind in COLUMNS]
    measured = [] if estimate.measured is None else [f"{estimate.measured / GIB:.2f}"]
    peak = f"**{estimate.peak / GIB:.2f}**"
    return "| " + " | ".join([estimate.name, *cells, estimate.update, peak, *measured]) + " |"


def verdict(
    estimates: Sequence[MemoryEstimate], limit: float, shape: ModelSpec, batch_size: int
) -> list[str]:
    """Return the sentences below the table: what fits into ``limit`` bytes, and what may help."""
    lines = [
        f"peak: what torch's allocator hands out, with {estimates[0].workspace / GIB:.2f} for the workspaces "
        f"of matrix products. A GPU needs {FRAGMENTS:.0%} more for fragmentation and {CONTEXT / GIB:.1f} for "
        "CUDA's context."
    ]
    fits = [estimate for estimate in estimates if estimate.card <= limit]
    size = f"{limit / GIB:g} GiB"
    for estimate in estimates:
        verb = "fits" if estimate in fits else "does not fit"
        lines.append(f"{verb} {size}: {estimate.name}, {estimate.card / GIB:.2f} in all")
    if not fits:
        least = min(estimates, key=lambda estimate: estimate.card)
        ways = [
            *([] if least.checkpointed else ["--activation-checkpointing"]),
            *([] if least.lora else [f"--lora {RANK}"]),
            *([f"--batch-size 1 with --gradient-accumulation-steps {batch_size}"] if batch_size > 1 else []),
            *("a smaller --size", "fewer --student-steps"),
        ]
        lines.append("what may help: " + ", ".join(ways))
    counts = _other_parts(shape)
    if counts:
        bf16 = ", ".join(f"{part} {2 * count / GIB:.2f}" for part, count in counts.items())
        lines.append(f"not counted, as only previews and validation bring them to the GPU, in bf16: {bf16}")
    return lines


def _other_parts(shape: ModelSpec) -> dict[str, int]:
    """Return the number of parameters of each net but the transformer."""
    import torch

    from fewstep.inference.meta_init import init_on_meta

    parts = [part for part in shape.configs if part != "transformer"]
    nets = {part: init_on_meta(shape, part, torch.bfloat16) for part in parts}
    return {part: sum(p.numel() for p in net.parameters()) for part, net in nets.items()}


def _side(shape: ModelSpec, size: int | None) -> int:
    side, unit, most = size or shape.side, shape.downscale * shape.patch, shape.max_side
    if side % unit or not 0 < side <= most or size == 0:
        raise UserError(f"--size must be a multiple of {unit} up to {most}, not {size}")
    return side


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--measure needs a GPU, and torch sees none here; leave it out for the estimate")
