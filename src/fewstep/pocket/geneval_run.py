"""The scene score of a run's candidates: their rows, and contact sheets with a verdict on each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from fewstep.core.types import UserError
from fewstep.evaluate.candidates import LAST_SEED, Candidate
from fewstep.evaluate.image_cache import ImageCache
from fewstep.evaluate.metrics import Measured
from fewstep.evaluate.report import Row
from fewstep.images.grid import sheet
from fewstep.pocket.geneval import REAL, GenEvalTest, Verdict, against, judge, measure

SHOWN = 10
"""Pictures of each category and half on a sheet."""

COLUMNS = 10


@dataclass(frozen=True)
class GenEvalResult:
    """A row each, the real scenes' first, and a contact sheet each by label."""

    rows: tuple[Row, ...]
    sheets: dict[str, Image]


def score(
    candidates: Sequence[Candidate],
    test: GenEvalTest,
    producer: ImageCache,
    teacher: str | None,
    first_seed: int,
) -> GenEvalResult:
    """Draw, judge and measure every candidate on the same prompts and seeds, and the real scenes as well.

    Raises:
        UserError: the seeds would pass the last one there is.
    """
    seeds = test.seeds(first_seed)
    if seeds[-1] > LAST_SEED:
        raise UserError(f"the seeds of scenes must lie below {LAST_SEED}, so not from {first_seed}")
    pictures = {REAL: test.real}
    for candidate in candidates:
        name = f"{candidate.label}, scenes"
        pictures[candidate.label] = producer.generate(candidate, test.prompts(), seeds, name)
    verdicts = {label: judge(images, test) for label, images in pictures.items()}
    measured = {label: measure(own, test.scenes) for label, own in verdicts.items()}
    rows = [_row(label, own, measured, teacher) for label, own in measured.items()]
    return GenEvalResult(
        tuple(rows),
        {label: geneval_sheet(images, verdicts[label], test) for label, images in pictures.items()},
    )


def merge_rows(rows: Sequence[Row], scored: Sequence[Row]) -> list[Row]:
    """One row a label, with the figures of both; the real scenes' stands before the models'."""
    more = {row.label: row for row in scored}
    ceilings = [row for row in rows if row.label not in more]
    own = [
        replace(row, figures=row.figures | more.pop(row.label).figures) for row in rows if row.label in more
    ]
    return [*ceilings, *more.values(), *own]


def geneval_sheet(images: NDArray[np.uint8], verdicts: Sequence[Verdict], test: GenEvalTest) -> Image:
    """The first pictures of each category and half, each with "ok" or what is wrong, and its prompt."""
    count: dict[tuple[str, bool], int] = {}
    shown: list[int] = []
    for index, scene in enumerate(test.scenes):
        cell = scene.category, scene.held_out
        count[cell] = count.get(cell, 0) + 1
        if count[cell] <= SHOWN:
            shown.append(index)
    labels = [
        f"{'ok' if verdicts[i].right else 'NO, ' + verdicts[i].why}: {test.scenes[i].prompt}" for i in shown
    ]
    return sheet(images[shown], labels, COLUMNS)


def _row(label: str, own: Measured, measured: dict[str, Measured], teacher: str | None) -> Row:
    figures = dict(own.figures)
    if teacher is not None and label not in (teacher, REAL):
        figures |= against(own, measured[teacher])
    return Row(label, len(own.per_prompt["scene"]), figures)
