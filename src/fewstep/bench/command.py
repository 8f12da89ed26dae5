"""``fewstep bench``: a generation as a whole process, alone or against stock diffusers."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fewstep.types import UserError


def bench(
    model: str | None = None,
    /,
    *,
    against: Path,
    prompt: str = "a red apple, 3D style",
    steps: int = 4,
    rounds: int = 5,
    threads: int = 0,
) -> None:
    """Time a prompt to a picture as a whole process, in turn with stock diffusers on the same student.

    Args:
        model: The model, as generate takes it; by default the one that ships.
        against: The same student as a diffusers folder, for the stock pipeline in eager fp32.
        prompt: What to draw.
        steps: Sampling steps.
        rounds: Counted rounds of both, after one that is not counted.
        threads: Processor threads of each; 0 takes one a core.
    """
    from fewstep.bench.stock import paired

    if rounds < 1 or steps < 1:
        raise UserError("--rounds and --steps must be at least 1")
    if not (against / "model_index.json").is_file():
        raise UserError(f"--against {against}: not a diffusers folder (no model_index.json)")
    from fewstep.families import sd3
    from fewstep.families.folder import read_index

    read_index(against, sd3.PIPELINE, sd3.REQUIRED)
    cores = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as work:
        result = paired(model, against, prompt, steps, rounds, cores, Path(work))
    print(f"{'whole process':16}{'seconds (min, median, max)':>30}{'peak memory':>14}")
    for name, side in (("fewstep", result.ours), ("stock diffusers", result.stock)):
        print(f"{name:16}{_spread([c.seconds for c in side]):>30}{max(c.megabytes for c in side):>11.0f} MB")
    print(f"ours is {result.ratio:.1f} times faster (median of {rounds} pairs)")
    print(f"the two pictures agree to {result.psnr:.1f} dB PSNR")


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}  {statistics.median(values):.2f}  {max(values):.2f}"
