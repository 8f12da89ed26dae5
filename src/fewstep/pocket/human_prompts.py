"""Prompts that people wrote: is a concept that a person would expect among the nearest ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from fewstep.core import stats
from fewstep.core.types import UserError
from fewstep.evaluate.candidates import LAST_SEED, Candidate
from fewstep.evaluate.image_cache import ImageCache
from fewstep.evaluate.metrics import DEPTHS
from fewstep.evaluate.report import Row
from fewstep.evaluate.retrieval import topk_accuracy
from fewstep.images.grid import sheet
from fewstep.pocket.geneval_run import GenEvalResult
from fewstep.pocket.stickers import Reference

COLUMNS = 12
SHOWN = 144
"""Pictures on a sheet."""


@dataclass(frozen=True)
class HumanPrompt:
    """A prompt, and the concepts of which one is expected."""

    prompt: str
    concepts: tuple[str, ...]


def load(path: Path, references: Sequence[Reference]) -> tuple[HumanPrompt, ...]:
    """Lines ``PROMPT<TAB>CONCEPT|CONCEPT``; empty ones and those that begin with ``#`` are skipped.

    Raises:
        UserError: the file cannot be read, a line has no such form, or nothing is called by that name.
    """
    known = {reference.concept for reference in references}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    found: list[HumanPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt, tab, rest = line.partition("\t")
        concepts = tuple(rest.split("|"))
        if not tab or not prompt.strip():
            raise UserError(f"{path}, line {number}: give a prompt, a tab, and concepts with | between them")
        if unknown := [name for name in concepts if name not in known]:
            raise UserError(f"{path}, line {number}: there is no rendering of {unknown[0]!r}")
        found.append(HumanPrompt(prompt, concepts))
    if not found:
        raise UserError(f"{path} holds no prompts")
    return tuple(found)


def score(
    candidates: Sequence[Candidate],
    written: Sequence[HumanPrompt],
    producer: ImageCache,
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
    teacher: str | None,
    first_seed: int,
) -> GenEvalResult:
    """One picture a prompt and candidate: ``written_top1`` and ``written_top5``, and to the teacher's.

    Raises:
        UserError: the seeds would pass the last one there is.
    """
    prompts = [one.prompt for one in written]
    seeds = [first_seed + row for row in range(len(prompts))]
    if seeds[-1] > LAST_SEED:
        raise UserError(f"the seeds of the prompts must lie below {LAST_SEED}, so not from {first_seed}")
    labels = [reference.concept for reference in references]
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    sheets: dict[str, Image] = {}
    for candidate in candidates:
        made = producer.images(candidate, prompts, seeds, f"{candidate.label}, written")
        found[candidate.label] = {k: topk_any(made.features, written, gallery, labels, k) for k in DEPTHS}
        said = [
            f"{'ok' if hit >= 0.5 else 'NO'}: {one.prompt}"
            for one, hit in zip(written, found[candidate.label][DEPTHS[-1]], strict=True)
        ]
        sheets[candidate.label] = sheet(made.images[:SHOWN], said[:SHOWN], COLUMNS)
    rows: list[Row] = []
    for label, rates in found.items():
        figures = {f"written_top{k}": stats.mean(rate) for k, rate in rates.items()}
        if teacher is not None and label != teacher:
            for k, rate in rates.items():
                ratio = stats.ratio(rate, found[teacher][k])
                figures |= {} if ratio is None else {f"written_top{k}_ratio": ratio}
        rows.append(Row(label, len(prompts), figures))
    return GenEvalResult(tuple(rows), sheets)


def topk_any(
    features: NDArray[np.floating],
    written: Sequence[HumanPrompt],
    gallery: NDArray[np.floating],
    labels: Sequence[str],
    k: int,
) -> NDArray[np.float64]:
    """Whether one of the expected concepts is among the ``k`` nearest, ``[N]`` in [0, 1]."""
    most = max(len(one.concepts) for one in written)
    tries = [[one.concepts[min(at, len(one.concepts) - 1)] for one in written] for at in range(most)]
    return np.max([topk_accuracy(features, wanted, gallery, labels, k) for wanted in tries], axis=0)
