"""Compare bundles with their PyTorch model: size, speed, and PSNR of the images.

    python tools/compare_bundles.py models/pocket-teacher bundle-32 bundle-8

Times are the least processor time of several rounds on one thread, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.types import Model
from fewstep.families import sd3
from fewstep.runtime.bundle import read
from fewstep.runtime.model import open_bundle

PROMPTS = ["a red apple, 3D style", "a cat face, flat style", "two blue books", "noto style guitar"]
STEPS = 4
ROUNDS = 12


def draw(model: Model) -> np.ndarray:
    """Return images ``[B, 3, h, w]`` in [0, 255], at the model's own guidance scale."""
    cond, velocity = model.text(PROMPTS), model.velocity
    if model.guidance is not None:
        velocity = Guided(velocity, model.text([""]), model.guidance)
    noise = model.from_numpy(sampling.batch_noise(range(len(PROMPTS)), model.latent))
    latents = sampling.sample_flow(velocity, noise, schedule.grid(STEPS, model.shift), cond)
    images = np.asarray(model.to_numpy(model.codec.decode(latents)), np.float32)
    return images.clip(-1, 1) * 127.5 + 127.5


def stages(model: Model) -> list[float]:
    """Return the least milliseconds of text encoding, one step and decoding, for one prompt and image."""
    cond = model.text(PROMPTS[:1])
    x: Any = model.from_numpy(sampling.batch_noise([0], model.latent))
    step = sampling.prepare_steps(model.velocity, [0.75], cond)[0]
    least: list[float] = []
    for action in (lambda: model.text(PROMPTS[:1]), lambda: step(x), lambda: model.codec.decode(x)):
        taken: list[float] = []
        for _ in range(ROUNDS):
            start = time.process_time()
            action()
            taken.append(1000 * (time.process_time() - start))
        least.append(min(taken))
    return least


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a diffusers folder")
    parser.add_argument("bundles", nargs="+", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        family = sd3.load(given.folder, t5=False)
        reference = draw(family)
        columns = ["bundle", "engine", "MB", "text, ms", "step, ms", "decoder, ms", "to torch, dB"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        print(f"| torch | | | {' | '.join(f'{ms:.1f}' for ms in stages(family))} | |", flush=True)
    for folder in given.bundles:
        bundle = read(folder)
        model = open_bundle(bundle, threads=1)
        errors = np.square(draw(model) - reference).mean((1, 2, 3))
        losses = 20 * np.log10(255 / np.sqrt(errors).clip(1e-6))
        row = [folder.name, bundle.engine, f"{bundle.size / 1e6:.1f}"]
        row += [*(f"{ms:.1f}" for ms in stages(model)), f"{losses.mean():.1f} (least {losses.min():.1f})"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
