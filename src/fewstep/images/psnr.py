"""How alike pictures are."""

from __future__ import annotations

import numpy as np


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit pixels of one shape, dB; infinite where they are equal."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
