"""The options that all distillations share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.core.cpu import threads as check_threads
from fewstep.core.types import UserError
from fewstep.core.validate import require_at_least, require_fraction, require_positive


@Parameter(name="*")
@dataclass(frozen=True)
class DistillConfig:
    """The options that all distillations share.

    Attributes:
        teacher: The teacher, a diffusers folder or a hub name.
        output: Run folder; the student is written to its subfolder `model` as a diffusers folder.
        samples: The teacher's samples, of `fewstep sample-teacher`. [default: made in the run folder]
        data: The data set whose captions are the prompts, where samples are made.
            [default: data/stickers]
        num_samples: How many samples are made. [default: 2000]
        guidance: The teacher's guidance scale, where samples are made. [default: the teacher's own]
        teacher_guidance: The teacher's guidance scale in the losses. [default: that of the samples]
        init: Start the student from this model; with --lora, from the `lora` folder of an earlier run.
            [default: from the teacher]
        student_steps: Sampling steps of the student.
        steps: Training steps.
        batch_size: Samples per training step.
        gradient_accumulation_steps: Micro-batches per training step; each process holds the activations of
            one at a time.
        lr: Learning rate.
        warmup: Share of the steps, at the start, in which the learning rate rises from zero.
        decay: Share of the steps, at the end, in which it falls to zero.
        ema: Decay of the averaged weights, which are the student.
        betas: Two decay rates of AdamW.
        weight_decay: Weight decay of matrices.
        clip: Largest norm of a gradient.
        precision: Arithmetic of the nets: fp32, bf16, or auto, which is bf16 where the machine has it.
        t5_dropout: Share of the batches in which the student is not conditioned on T5; at 1 it never is.
        lora: Rank of LoRA adapters: teacher, student and proxy share one frozen net. 0 is full fine-tuning.
        dtype: Of the frozen weights: float32 or bfloat16; trained weights are float32.
        activation_checkpointing: Recompute the blocks in the backward pass: less memory, a third more time.
        compile: Compile the blocks.
        max_minutes: Train for at most this many minutes, and at most --steps; 0 sets no time limit. In a
            chain it holds for each stage.
        keep_every: Training steps between copies of the student's weights, `students/STEP.safetensors` in the
            run folder; 0 keeps none.
        validate_every: Training steps between validations by KID to the teacher's samples; 0 turns them off.
        seed: Of the data order and of all noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.

    Raises:
        UserError: a value is out of its range.
    """

    teacher: str = "models/pocket-teacher"
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    samples: Path | None = None
    data: Path | None = None
    num_samples: int | None = None
    guidance: float | None = None
    teacher_guidance: float | None = None
    init: str | None = None
    student_steps: int = 4
    steps: int = 600
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    lr: float = 1e-4
    warmup: float = 0.05
    decay: float = 0.3
    ema: float = 0.99
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    t5_dropout: float = 1.0
    lora: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    max_minutes: float = 0.0
    keep_every: int = 0
    validate_every: int = 0
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        require_positive(
            batch_size=self.batch_size,
            num_samples=1 if self.num_samples is None else self.num_samples,
            student_steps=self.student_steps,
        )
        self._check_unused()
        require_fraction(t5_dropout=self.t5_dropout)
        require_at_least(0, lora=self.lora, validate_every=self.validate_every, keep_every=self.keep_every)
        check_threads(self.threads)
        if self.dtype != "float32" and not self.lora:
            raise UserError("--dtype bfloat16 is for frozen weights: give a rank with --lora, too")

    def _check_unused(self) -> None:
        """Refuse options that would have no effect.

        Raises:
            UserError: there is one.
        """
        for option in ("guidance", "data", "num_samples"):
            if self.samples is not None and getattr(self, option) is not None:
                name = option.replace("_", "-")
                raise UserError(f"--{name} is for samples still to be made: leave it out with --samples")


DEFAULT = DistillConfig()
"""The options at their defaults."""
