"""``fewstep estimate-memory``: the memory that a distillation's step needs, before anybody owns the GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fewstep.core.optional import need
from fewstep.core.types import UserError
from fewstep.core.validate import parse_bytes as memory_of
from fewstep.core.validate import require_positive
from fewstep.distill.dry_run import FakeSetup
from fewstep.families.presets import read_spec
from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_plan import CONTEXT, FRAGMENTS

if TYPE_CHECKING:
    from fewstep.train.run import Run

Method = Literal["flash", "trajectory", "dmd", "tdm", "ladd", "lcm"]
"""``flash`` is its second stage; the third asks the value of a time which branch acts, and has none here."""

GIB = 2**30
RANK = 64
"""Of LoRA roles, where none is told."""

COLUMNS = ("frozen", "learning", "gradients", "optimizer", "averages", "activations")


@dataclass(frozen=True)
class MemoryEstimate:
    """What one setting needs.

    Attributes:
        name: of the setting.
        turn: the net in whose turn most is held.
        held: bytes of every kind then.
        workspace: bytes of matrix products beside them.
        measured: ``torch.cuda.max_memory_allocated`` of the real step, where it was taken.
    """

    name: str
    turn: str
    held: dict[str, int]
    workspace: int
    measured: int | None = None

    @property
    def peak(self) -> int:
        """Bytes that torch's allocator gives out at most."""
        return sum(self.held.values()) + self.workspace

    @property
    def card(self) -> float:
        """Bytes that the card must have."""
        return self.peak * (1 + FRAGMENTS) + CONTEXT


def estimate_memory(
    *,
    model: str = "sd3.5-medium",
    method: Method = "flash",
    lora: int | None = None,
    activation_checkpointing: bool | None = None,
    size: int | None = None,
    batch_size: int = 1,
    student_steps: int = 4,
    memory: str = "24GiB",
    measure: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Print the peak memory of one training step on a GPU that need not be there.

    The very step of the recipe runs on tensors that have shapes and no bytes, and what they would hold is
    counted; no weights are read. A setting of SD3.5 Medium takes a minute or two. Captions and samples are
    taken to be encoded before (`fewstep sample-teacher`).

    Args:
        model: sd3.5-medium, flux-dev, or a diffusers folder, of which configurations alone are read.
        method: The distillation; of flash's stages the second.
        lora: Rank of LoRA roles; 0 is whole nets. [default: 64 and 0, a line each]
        activation_checkpointing: Compute the blocks anew in the backward pass. [default: with and without]
        size: Pixels along a side. [default: the model's own]
        batch_size: Samples a micro-batch.
        student_steps: Steps of the student.
        memory: Of the card.
        measure: Run the real step too, with random weights, on the GPU that is there.
    """
    require_positive(batch_size=batch_size, student_steps=student_steps)
    if lora is not None and lora < 0:
        raise UserError(f"--lora must be at least 0, not {lora}")
    need("torch", "diffusers", "transformers")
    shape, limit = read_spec(model), memory_of(memory)
    side = _side(shape, size)
    if measure:
        _gpu()
    setting = FakeSetup(
        shape=shape,
        side=side,
        batch_size=batch_size,
        student_steps=student_steps,
        device="cpu",
        init="imagined",
    )
    print(f"{shape.name}, {method}, {side} px, batch {batch_size}, a student of {student_steps} steps; GiB\n")
    more = " measured |" if measure else ""
    print("| roles, blocks | " + " | ".join(COLUMNS) + " | turn | peak |" + more)
    print("|---|" + "--:|" * len(COLUMNS) + "---|--:|" + ("--:|" if measure else ""))
    lines: list[MemoryEstimate] = []
    for rank in (RANK, 0) if lora is None else (lora,):
        for again in (True, False) if activation_checkpointing is None else (activation_checkpointing,):
            line = predict(method, replace(
                setting, lora=rank, recompute=again, dtype="bfloat16" if rank else "float32"
            ), measure=measure)  # fmt: skip
            lines.append(line)
            print(row(line), flush=True)
    print()
    for sentence in verdict(lines, limit, shape, batch_size):
        print(sentence)


def predict(method: str, setting: FakeSetup, *, gpu: bool = True, measure: bool = False) -> MemoryEstimate:
    """The memory of one setting.

    Args:
        method: as :data:`Method`.
        setting: of which model, how.
        gpu: as a GPU would hold it; otherwise as this CPU would, in float32.
        measure: run the real step too.
    """
    import warnings

    from fewstep.modules.memory_tracker import WORKSPACE, fake_tensors
    from fewstep.train import memory

    name = ("roles " + str(setting.lora) if setting.lora else "whole nets") + (
        ", recomputed" if setting.activation_checkpointing else ", kept"
    )
    if sys.stderr.isatty():
        print(f"rehearsing: {name}", file=sys.stderr)
    with warnings.catch_warnings(), fake_tensors(gpu=gpu) as ledger:
        warnings.simplefilter("ignore")  # torch's, about fake tensors
        peaks = memory.profile_steps(fake_run(method, setting, "bf16" if gpu else "fp32"), ledger)
    turn, peak = max(peaks.items(), key=lambda pair: pair[1].total)
    line = MemoryEstimate(name, turn, peak.held, WORKSPACE if gpu else 0)
    if not measure:
        return line
    gc.collect()
    real = fake_run(method, replace(setting, device="cuda"), "bf16")
    return replace(line, measured=memory.measure_steps(real))


def fake_run(method: str, setting: FakeSetup, precision: str) -> Run:
    """The recipe's run, of shapes, in a folder that is not there. The proxy has one turn a step: a second one
    needs no more memory."""
    from fewstep.distill import recipes

    options: dict[str, Any] = {"proxy_updates": 1} if method in ("flash", "dmd", "tdm") else {}
    if method == "flash":
        run = next(recipes.flash(setting=setting, warm_start_steps=0, split_steps=0, **options))
    else:
        run = getattr(recipes, method)(setting=setting, **options)
    gc.collect()  # roles and the layers that they hook know each other
    options = {"precision": precision, "tokens": 0}
    return replace(run, folder=Path("imagined"), options=replace(run.options, **options))


def row(line: MemoryEstimate) -> str:
    """A line of the table."""
    cells = [f"{line.held[kind] / GIB:.2f}" for kind in COLUMNS]
    end = [] if line.measured is None else [f"{line.measured / GIB:.2f}"]
    return "| " + " | ".join([line.name, *cells, line.turn, f"**{line.peak / GIB:.2f}**", *end]) + " |"


def verdict(lines: Sequence[MemoryEstimate], limit: float, shape: ModelSpec, batch: int) -> list[str]:
    """What to say below the table."""
    told = [
        f"peak: what torch's allocator gives out, with {lines[0].workspace / GIB:.2f} for the workspaces of "
        f"matrix products. A card needs {FRAGMENTS:.0%} more (room between blocks) and {CONTEXT / GIB:.1f} "
        "for CUDA's context."
    ]
    fits = [line for line in lines if line.card <= limit]
    size = f"{limit / GIB:g} GiB"
    for line in lines:
        verb = "fits" if line in fits else "does not fit"
        told.append(f"{verb} {size}: {line.name}, {line.card / GIB:.2f} in all")
    if not fits:
        least = min(lines, key=lambda line: line.card)
        ways = [
            *(["--activation-checkpointing"] if not least.name.endswith("recomputed") else []),
            *([f"--lora {RANK}"] if least.name.startswith("whole") else []),
            *([f"--batch-size 1 with --gradient-accumulation-steps {batch}"] if batch > 1 else []),
            *("a smaller --size", "fewer --student-steps"),
        ]
        told.append("what may help: " + ", ".join(ways))
    others = ", ".join(f"{part} {2 * many / GIB:.2f}" for part, many in _other_parts(shape).items())
    told.append(f"not counted, for sheets and scores alone bring them to the device, in bf16: {others}")
    return told


def _other_parts(shape: ModelSpec) -> dict[str, int]:
    """Return the number of parameters of each net but the transformer."""
    import torch

    from fewstep.inference.meta_init import init_on_meta

    nets = {
        part: init_on_meta(shape, part, torch.bfloat16) for part in shape.configs if part != "transformer"
    }
    return {part: sum(p.numel() for p in net.parameters()) for part, net in nets.items()}


def _side(shape: ModelSpec, size: int | None) -> int:
    side, unit, most = size or shape.side, shape.downscale * shape.patch, shape.max_side
    if side % unit or not 0 < side <= most or size == 0:
        raise UserError(f"--size must be a multiple of {unit} up to {most}, not {size}")
    return side


def _gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--measure needs a GPU, and torch sees none here; leave it out for the prediction")
