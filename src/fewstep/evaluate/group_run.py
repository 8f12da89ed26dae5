"""The measurement of one prompt group: images and metrics of every candidate and ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from fewstep.core.stats import Interval
from fewstep.evaluate.candidates import Candidate
from fewstep.evaluate.image_cache import CHUNK, ImageCache, slug, without_features
from fewstep.evaluate.image_grids import first_prompts
from fewstep.evaluate.metric import (
    FEATURES,
    REFERENCES,
    ComparesToTeacher,
    ImageBatch,
    Metric,
    MetricFactory,
    Prompt,
    References,
)
from fewstep.evaluate.prompt_set import Measured, PromptGroup
from fewstep.evaluate.report import Row

MAIN = "sheet"
"""Stands in file names for the name of a set's first group, which has none."""


@dataclass(frozen=True)
class GroupPlan:
    """A prompt group with the metrics, the images per prompt and the first seed of this run."""

    group: PromptGroup
    metrics: tuple[MetricFactory, ...]
    images_per_prompt: int
    first_seed: int

    @property
    def needs_features(self) -> bool:
        """Whether any metric reads features."""
        return any(FEATURES in metric.needs for metric in self.metrics)

    def prompts(self) -> list[Prompt]:
        """Return the prompt of every image, prompts outermost, ``[P * S]``."""
        return [prompt for prompt in self.group.prompts for _ in range(self.images_per_prompt)]

    def seeds(self) -> list[int]:
        """Return the seed of every image, ``[P * S]``."""
        return [self.first_seed + row for row in range(len(self.group.prompts) * self.images_per_prompt)]


@dataclass(frozen=True)
class GroupResult:
    """A row per ceiling and candidate, the number of images by label, and image grids by file name."""

    plan: GroupPlan
    rows: tuple[Row, ...]
    images: Mapping[str, int]
    grids: Mapping[str, Image]


def measure(
    plan: GroupPlan, candidates: Sequence[Candidate], teacher: str | None, images: ImageCache
) -> GroupResult:
    """Generate and measure the images of every candidate, and measure the ceilings.

    Args:
        plan: the prompts and metrics.
        candidates: the models.
        teacher: label of the candidate that the others are compared with.
        images: makes images and features.
    """
    group = plan.group
    references = _references(plan, images)
    measured: dict[str, Measured] = {}
    grids: dict[str, Image] = {}
    for ceiling in group.ceilings:
        pixels = ceiling.draw()
        batch = without_features(pixels)
        if plan.needs_features:
            batch = ImageBatch(pixels, images.real(list(pixels), ceiling.label))
        measured[ceiling.label] = _measured(plan, batch, group.prompts, range(len(pixels)), references)
    for candidate in candidates:
        prompts, seeds = plan.prompts(), plan.seeds()
        batch = images.generated(
            candidate,
            [prompt.text for prompt in prompts],
            seeds,
            f"{candidate.label}, {group.name}" if group.name else candidate.label,
            features=plan.needs_features,
        )
        measured[candidate.label] = _measured(plan, batch, prompts, seeds, references)
    without_grid = {ceiling.label for ceiling in group.ceilings if not ceiling.grid}
    for label, each in measured.items():
        if label not in without_grid:
            grids[f"{group.name or MAIN}-{slug(label)}"] = (group.grid or first_prompts)(each)
    students = {candidate.label for candidate in candidates} - {teacher}
    rows = [
        Row(
            label,
            len(each.pixels),
            _figures(each, measured[teacher] if teacher and label in students else None),
        )
        for label, each in measured.items()
    ]
    return GroupResult(plan, tuple(rows), {row.label: row.images for row in rows}, grids)


def _references(plan: GroupPlan, images: ImageCache) -> References:
    references = plan.group.references
    if not plan.needs_features or not any(REFERENCES in metric.needs for metric in plan.metrics):
        return References(references, np.zeros((len(references), 0), np.float32))
    return References(references, images.real([each.image for each in references], "references"))


def _measured(
    plan: GroupPlan,
    batch: ImageBatch,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    references: References,
) -> Measured:
    """Show the images to new metrics, a chunk at a time."""
    metrics: list[Metric] = [
        factory(references) if REFERENCES in factory.needs else factory() for factory in plan.metrics
    ]
    for start in range(0, len(prompts), CHUNK):
        chunk = slice(start, start + CHUNK)
        part = ImageBatch(batch.pixels[chunk], batch.features[chunk])
        for metric in metrics:
            metric.update(part, prompts[chunk])
    return Measured(batch.pixels, prompts, seeds, metrics)


def _figures(measured: Measured, teacher: Measured | None) -> dict[str, Interval]:
    figures: dict[str, Interval] = {}
    for metric in measured.metrics:
        figures |= metric.compute()
    if teacher is not None:
        for own, theirs in zip(measured.metrics, teacher.metrics, strict=True):
            if isinstance(own, ComparesToTeacher):
                figures |= own.compare(theirs)
    return figures
