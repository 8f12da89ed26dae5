"""Times whole processes in turn: fewstep, and diffusers with the same student, seed and grid.

Run as a script (``python -m fewstep.bench.diffusers_process FOLDER PROMPT SEED STEPS OUT``) this file is the
diffusers baseline: its documented use in fp32, from fewstep's noise of the seed.
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
    """Wall time of one process in seconds, and its peak memory in MB (0 if the system does not report it)."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class PairedRuns:
    """The processes of both sides in every round.

    Attributes:
        fewstep: one cost per round.
        baseline: one cost per round, of diffusers.
        psnr: between the images of the last round, dB, on 8-bit pixels.
    """

    fewstep: list[Cost]
    baseline: list[Cost]
    psnr: float

    @property
    def ratio(self) -> float:
        """Median over the rounds of the time of diffusers over that of fewstep."""
        pairs = zip(self.baseline, self.fewstep, strict=True)
        return statistics.median(theirs.seconds / own.seconds for theirs, own in pairs)


def run_pairs(
    model: str | None, folder: Path, prompt: str, steps: int, rounds: int, threads: int, work: Path
) -> PairedRuns:
    """Run both sides in turn, ``rounds`` times after one round that is not counted.

    Args:
        model: fewstep's, as ``--model`` takes it; ``None`` is the model that ships with it.
        folder: the same student as a diffusers folder.
        prompt: the text prompt; the seed is 0.
        steps: sampling steps.
        rounds: counted rounds, at least 1.
        threads: processor threads of each side.
        work: folder for the two images.

    Raises:
        UserError: one side failed; the message quotes its last line.
    """
    image, baseline_image = work / "fewstep.png", work / "diffusers.png"
    python = [sys.executable, "-m"]
    own = [*python, "fewstep", "generate", prompt, "--seed", "0", "--steps", str(steps)]
    own += ["--threads", str(threads), "-o", str(image), *(["--model", model] if model else [])]
    theirs = [*python, "fewstep.bench.diffusers_process", str(folder), prompt, "0", str(steps)]
    theirs += [str(baseline_image)]
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(rounds + 1):
        for side, command in zip(costs, (own, theirs), strict=True):
            side.append(_run(command, threads))
    return PairedRuns(costs[0][1:], costs[1][1:], file_psnr(image, baseline_image))


def _run(command: Sequence[str], threads: int) -> Cost:
    import os

    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        output = process.stdout.read() if process.stdout else b""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        last = (output.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command[:4])} failed: {last}")
    scale = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss: bytes there, KiB here
    return Cost(seconds, used.ru_maxrss / scale)


def file_psnr(one: Path, other: Path) -> float:
    """Return the PSNR of two image files of one size in dB; infinite for equal images."""
    import numpy as np

    from fewstep.images.decode import to_rgb
    from fewstep.images.io import open_image
    from fewstep.images.psnr import psnr

    return psnr(*(np.asarray(to_rgb(open_image(path))) for path in (one, other)))


def _generate(folder: str, prompt: str, seed: str, steps: str, out: str) -> None:
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
    image = pipe(
        prompt,
        sigmas=np.linspace(1, 1 / int(steps), int(steps)).tolist(),  # the scheduler shifts them
        num_inference_steps=int(steps),
        guidance_scale=1.0,
        latents=torch.from_numpy(noise),
        height=config.sample_size * pipe.vae_scale_factor,
        width=config.sample_size * pipe.vae_scale_factor,
        max_sequence_length=0,
    ).images[0]
    image.save(out)


if __name__ == "__main__":
    _generate(*sys.argv[1:])
