"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

import numpy as np


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pixels of one shape in dB; infinite for equal pixels."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
