"""Calibrated rounding of weights in groups (GPTQ; Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

import numpy as np

GROUP = 64
"""Number of codes that share a scale, for codes of less than 8 bits."""

CLIP_RATIOS = np.linspace(0.7, 1.0, 7, dtype=np.float32)
"""Candidate clipping ratios of a group's peak. Clipping can cost less than coarser codes."""

LARGEST = float(np.finfo(np.float16).max)
"""Largest scale of a group. Compensation of earlier columns can move a group's peak beyond it."""


def to_groups(
    matrix: np.ndarray, bits: int, factor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return codes with a scale per group: ``(codes - 2^(bits - 1)) * scale`` approximates ``matrix``.

    The clipping ratio of a group is the one of :data:`CLIP_RATIOS` with the smallest error. With ``factor``,
    the products with the calibration inputs are approximated instead: later columns compensate the error of
    earlier ones before they are rounded (GPTQ; Frantar et al., arXiv 2210.17323, section 3).

    Args:
        matrix: float32 ``[R, C]``; :data:`GROUP` divides ``C``.
        bits: bits per code.
        factor: Cholesky factor of the ``C`` inputs
            (:meth:`fewstep.export.common.calibration.CalibrationStats.factor`).

    Returns:
        uint8 codes ``[R C]`` in row-major order, float16 scales ``[R C / GROUP, 1]``, and the sum of squared
        errors of the elements.
    """
    half, count = 2 ** (bits - 1), matrix.shape[1]
    left = matrix.copy()
    codes, scales = np.empty_like(left), np.empty((len(left), count // GROUP), np.float32)
    for begin in range(0, count, GROUP):
        group = left[:, begin : begin + GROUP]  # a view
        scale = _scale(group, half)
        scales[:, begin // GROUP] = scale[:, 0]
        if factor is None:
            codes[:, begin : begin + GROUP] = _codes(group, scale, half)
            continue
        errors = np.empty_like(group)
        for at in range(GROUP):
            row, column = factor[begin + at], group[:, at : at + 1]
            code = _codes(column, scale, half)
            codes[:, begin + at] = code[:, 0]
            errors[:, at] = ((column - code * scale) / row[begin + at])[:, 0]
            group[:, at + 1 :] -= np.outer(errors[:, at], row[begin + at + 1 : begin + GROUP])
        left[:, begin + GROUP :] -= errors @ factor[begin : begin + GROUP, begin + GROUP :]
    restored = (codes.reshape(-1, GROUP) * scales.reshape(-1, 1)).reshape(matrix.shape)
    packed = (codes + half).astype(np.uint8).reshape(-1)
    return packed, scales.reshape(-1, 1).astype(np.float16), float(np.square(restored - matrix).sum())


def _scale(groups: np.ndarray, half: int) -> np.ndarray:
    """Return the scale of the smallest error of each group (a row), rounded to float16, ``[N, 1]``."""
    peak = np.abs(groups).max(1, keepdims=True)
    best, least = np.ones_like(peak), np.full_like(peak, np.inf)
    for ratio in CLIP_RATIOS:
        scale = np.minimum(peak * ratio / (half - 1), LARGEST).astype(np.float16).astype(np.float32)
        scale[scale == 0] = 1  # a group of zeros, or below the range of float16
        error = np.square(_codes(groups, scale, half) * scale - groups).sum(1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _codes(groups: np.ndarray, scale: np.ndarray, half: int) -> np.ndarray:
    return np.rint(groups / scale).clip(-half, half - 1)
