"""``fewstep sample-teacher``: a teacher's samples as training data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.progress import stage
from fewstep.core.types import UserError
from fewstep.core.validate import require_positive
from fewstep.data.teacher_samples.progress import Ranks, progress_printer, ranks_from_env
from fewstep.pocket.options import OutputFolder

if TYPE_CHECKING:
    from fewstep.families.base import Family


def sample_teacher(
    *,
    teacher: str,
    output: OutputFolder,
    num_samples: int,
    data: Path = Path("data/stickers"),
    prompts: Path | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    student_steps: int = 0,
    t5: bool | None = None,
    images: Annotated[bool, Parameter(negative="")] = False,
    batch_size: int = 32,
    per_shard: int = 128,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
) -> None:
    """Write a guided teacher's samples, and its walks to them, as shards; stopped, the same command goes on.

    Under torchrun every process writes its share of the shards.

    Args:
        teacher: The teacher: a diffusers folder or a hub name.
        output: Folder for the shards.
        num_samples: How many samples.
        data: The data set whose training captions are the prompts, in an order by chance.
        prompts: A text file with one prompt a line instead; begun again where it has fewer than
            --num-samples.
        guidance: The teacher's guidance scale; 1 is none. [default: the teacher's own]
        steps: The teacher's steps. [default: the teacher's own]
        student_steps: Keep each walk at the times of a student of so many steps, which must divide --steps; 0
            keeps the latents alone.
        t5: Encode captions with T5 too, or without. [default: with, where the teacher has it]
        images: Keep the decoded pictures too: the shards then are a data set of pictures.
        batch_size: Samples walked at once.
        per_shard: Samples a shard: what an interruption costs at most.
        seed: Sample i starts from the noise of seed + i; also of the prompts' order.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a GPU, else float32.
        threads: Torch threads; 0 leaves torch's choice.
    """
    require_positive(num_samples=num_samples, batch_size=batch_size, per_shard=per_shard)
    if steps is not None:
        require_positive(steps=steps)
    if student_steps < 0:
        raise UserError("--student-steps must be at least 0")
    counted_threads(threads)
    ranks = ranks_from_env(os.environ)
    lines = _prompts(prompts, data, num_samples, seed)

    import torch

    from fewstep.data.teacher_samples import manifest
    from fewstep.data.teacher_samples.write import write_samples as write
    from fewstep.families.common import cuts_counted, fingerprint

    if threads:
        torch.set_num_threads(threads)
    with stage(f"loading {teacher}"):
        family = _load(teacher, guidance, t5, device, dtype, ranks)
    encoders = [part for name, part in family.parts.items() if name.startswith("text_encoder") and part]
    plan = manifest.make(
        family,
        lines,
        guidance=family.embedded_guidance if family.guidance is None else family.guidance,
        steps=steps or family.steps,
        student_steps=student_steps,
        seed=seed,
        weights=fingerprint(family.net),
        text="-".join(fingerprint(encoder) for encoder in encoders),
        dtype=str(family.net.dtype).removeprefix("torch."),
        clip_length=family.clip_length,
        per_shard=per_shard,
        pictures=images,
    )
    with cuts_counted(len(lines), "captions"):
        write(
            family,
            lines,
            plan,
            output,
            batch=batch_size,
            rank=ranks.rank,
            world=ranks.world,
            progress=progress_printer(),
        )
    print(output)


def _prompts(path: Path | None, data: Path, number: int, seed: int) -> list[str]:
    """``number`` prompts of the file in its order, or of the data set by chance."""
    if path is not None:
        from fewstep.cli.generate import read_prompts
        from fewstep.core.prompt_text import clean

        lines = [clean(line) for line in read_prompts((), str(path))]
        return [lines[row % len(lines)] for row in range(number)]
    from fewstep.data.captions import prompts_of
    from fewstep.data.shards import training_shards

    return prompts_of(training_shards(data), number, seed)


def _load(
    teacher: str, guidance: float | None, t5: bool | None, device: str, dtype: str, ranks: Ranks
) -> Family:
    """The teacher, at the guidance scale asked for."""
    from fewstep.core.validate import check_float
    from fewstep.pipeline.loading import load_family
    from fewstep.train.device import resolve_device

    place = resolve_device(device)
    kind = dtype if dtype != "auto" else "bfloat16" if place == "cuda" else "float32"
    scale = None if guidance is None else check_float("guidance", guidance, 0, 100)
    family = load_family(
        teacher, device=f"cuda:{ranks.local}" if place == "cuda" else place, dtype=kind, t5=t5
    )
    return family if scale is None else family.with_guidance(scale)
