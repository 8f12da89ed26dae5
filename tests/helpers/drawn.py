"""Pictures of a model, and how alike two are."""

from __future__ import annotations

import numpy as np
import torch

from fewstep.core import sampling, schedule
from fewstep.core.types import Model

PROMPTS = ["a red apple, 3D style", "two blue cars", "x"]


def draw(model: Model, rows: slice = slice(0, 3)) -> np.ndarray:
    """Pictures ``[B, 3, h, w]`` of these prompts and seeds, in four steps."""
    with torch.no_grad():
        cond = model.text(PROMPTS[rows])
        noise = model.from_numpy(sampling.batch_noise([0, 1, 2][rows], model.latent))
        latents = sampling.sample_flow(model.velocity, noise, schedule.grid(4, model.shift), cond)
        return model.to_numpy(model.codec.decode(latents))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In dB, against the range that the pictures use."""
    return float(20 * np.log10(np.ptp(a) / np.sqrt(np.square(a - b).mean())))
