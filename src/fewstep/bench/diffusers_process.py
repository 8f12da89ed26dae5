"""Whole processes, in turn: ours, and stock diffusers on the same student, seed and grid.

Run as a script (``python -m fewstep.bench.diffusers_process FOLDER PROMPT SEED STEPS OUT``), this file is
the stock side.
It does what a person who uses diffusers would do, in fp32; of ours only the noise of the seed runs there.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core.types import UserError


@dataclass(frozen=True)
class Cost:
    """One process: wall time in seconds, and its peak memory in MB (0 where the system does not tell)."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class PairedRuns:
    """Both sides of every round, and how alike the last round's pictures are (dB, on 8-bit pixels)."""

    ours: list[Cost]
    stock: list[Cost]
    psnr: float

    @property
    def ratio(self) -> float:
        """Median over the rounds of stock's time over ours."""
        return statistics.median(s.seconds / o.seconds for s, o in zip(self.stock, self.ours, strict=True))


def run_pairs(
    model: str | None, folder: Path, prompt: str, steps: int, rounds: int, threads: int, work: Path
) -> PairedRuns:
    """Generate with both, ``rounds`` times in turn after one round that is not counted.

    Args:
        model: ours, as ``--model`` takes it; ``None`` is the shipped one.
        folder: the same student as a diffusers folder.
        prompt: what to draw; seed 0.
        steps: sampling steps.
        rounds: counted rounds, at least 1.
        threads: processor threads of each side.
        work: folder for the two pictures.

    Raises:
        UserError: one side failed; its last line is quoted.
    """
    mine, theirs = work / "ours.png", work / "stock.png"
    ours = [sys.executable, "-m", "fewstep", "generate", prompt, "--seed", "0", "--steps", str(steps)]
    ours += ["--threads", str(threads), "-o", str(mine), *(["--model", model] if model else [])]
    stock = [
        sys.executable,
        "-m",
        "fewstep.bench.diffusers_process",
        str(folder),
        prompt,
        "0",
        str(steps),
        str(theirs),
    ]
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(rounds + 1):
        for side, command in zip(costs, (ours, stock), strict=True):
            side.append(_run(command, threads))
    return PairedRuns(costs[0][1:], costs[1][1:], psnr(mine, theirs))


def _run(command: Sequence[str], threads: int) -> Cost:
    import os

    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        said = process.stdout.read() if process.stdout else b""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        last = (said.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{' '.join(command[:4])} failed: {last}")
    scale = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss: bytes there, KiB here
    return Cost(seconds, used.ru_maxrss / scale)


def psnr(one: Path, other: Path) -> float:
    """Of two pictures of one size, dB; infinite where they are equal."""
    import numpy as np

    from fewstep.images import psnr as likeness
    from fewstep.images.io import open_image, to_rgb

    return likeness.psnr(*(np.asarray(to_rgb(open_image(path))) for path in (one, other)))


def _stock(folder: str, prompt: str, seed: str, steps: str, out: str) -> None:
    import numpy as np
    import torch
    from diffusers import StableDiffusion3Pipeline

    from fewstep.core.sampling import batch_noise
    from fewstep.families import sd3

    sd3.ARCHITECTURE.read_index(Path(folder))  # diffusers imports any library that it names
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    noise = batch_noise([int(seed)], (config.in_channels, config.sample_size, config.sample_size))
    picture = pipe(
        prompt,
        sigmas=np.linspace(1, 1 / int(steps), int(steps)).tolist(),  # the scheduler shifts them
        num_inference_steps=int(steps),
        guidance_scale=1.0,
        latents=torch.from_numpy(noise),
        height=config.sample_size * pipe.vae_scale_factor,
        width=config.sample_size * pipe.vae_scale_factor,
        max_sequence_length=0,
    ).images[0]
    picture.save(out)


if __name__ == "__main__":
    _stock(*sys.argv[1:])
