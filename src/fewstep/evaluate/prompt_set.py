"""The interface of a prompt set: prompts, and where there are any their truth and real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate.metric import Metric, MetricFactory, Prompt, Reference

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        columns: title, name of the figure, and the factor that it is shown with, per column. Columns and rows
            without any figure are left out.
        title: stands above the table.
    """

    columns: Sequence[tuple[str, str, float]]
    title: str = ""


@dataclass(frozen=True)
class Ceiling:
    """Real images of a group's prompts, measured like a model to show what the metrics allow at best.

    Attributes:
        label: the row's label.
        draw: returns one image per prompt, uint8 ``[P, 3, h, w]``.
        grid: whether the run draws an image grid of it.
    """

    label: str
    draw: Callable[[], NDArray[np.uint8]]
    grid: bool = False


@dataclass(frozen=True)
class Measured:
    """The images of one model or ceiling in one group, and the metrics that have seen them.

    Attributes:
        pixels: uint8 ``[N, 3, h, w]``, prompts outermost.
        prompts: the prompt of each image, ``[N]``.
        seeds: the seed of each image, ``[N]``.
        metrics: the group's metrics.
    """

    pixels: NDArray[np.uint8]
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are measured with the same metrics.

    Attributes:
        prompts: at least 2.
        name: of a further group, for file names and progress messages; empty for a set's first group.
        references: real images; none where metrics that need them shall not run.
        metrics: what is measured; those of `fewstep.evaluate.run.DEFAULT` whose needs are met when ``None``.
        images_per_prompt: of each prompt; the run's number when ``None``.
        seed_offset: how much higher the seeds of this group are than the run's first seed.
        ceilings: real images to measure besides the models.
        grid: draws a model's image grid; the first prompts with some seeds when ``None``.
        tables: of the report; one with all figures when empty.
    """

    prompts: Sequence[Prompt]
    name: str = ""
    references: Sequence[Reference] = ()
    metrics: Sequence[MetricFactory] | None = None
    images_per_prompt: int | None = None
    seed_offset: int = 0
    ceilings: Sequence[Ceiling] = ()
    grid: Callable[[Measured], Image] | None = None
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run, in groups.

    An extension is a callable that returns a `PromptSet`. Its keyword parameters are the options of the
    command line that it takes: ``prompts``, ``scenes``, ``detector``, ``human_prompts`` and ``data``.

    Attributes:
        name: what the report calls it.
        groups: at least one. The metrics of ``--metric`` are those of the first.
        description: a sentence of the report on what the prompts are.
        facts: further fields of ``results.json``.
        cache: folder that keeps the features of the references; the run's own when ``None``.
    """

    name: str
    groups: Sequence[PromptGroup]
    description: str = ""
    facts: Mapping[str, object] = field(default_factory=dict[str, object])
    cache: Path | None = None
