"""A run over several candidates: the same prompts, seeds and extractor, one set of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.core.types import UserError
from fewstep.evaluate.array_cache import Cache
from fewstep.evaluate.candidates import Candidate
from fewstep.evaluate.features import Extractor, OpenNsfwPool
from fewstep.evaluate.group_run import GroupPlan, measure
from fewstep.evaluate.image_cache import ImageCache, Progress, silent, slug
from fewstep.evaluate.metric import FEATURES, REFERENCES, TEACHER, TRUTH, MetricFactory
from fewstep.evaluate.metrics.diversity import Diversity
from fewstep.evaluate.metrics.kid import Kid
from fewstep.evaluate.metrics.kid_to_teacher import KidToTeacher
from fewstep.evaluate.metrics.retrieval import Retrieval
from fewstep.evaluate.prompt_set import PromptGroup, PromptSet, Table
from fewstep.evaluate.report import GroupTables, Results, Row, versions, write

DEFAULT: tuple[MetricFactory, ...] = (Retrieval, Diversity, Kid, KidToTeacher)
"""The metrics of a group that names none, as far as their needs are met."""

MOST_SEEDS = 1000
LAST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Plan:
    """A run before any image is generated; `plan` makes it."""

    prompt_set: PromptSet
    groups: tuple[GroupPlan, ...]
    seeds: int
    first_seed: int

    @property
    def needs_features(self) -> bool:
        """Whether any metric reads features."""
        return any(group.needs_features for group in self.groups)


def plan(
    prompt_set: PromptSet,
    *,
    metrics: Sequence[MetricFactory] = (),
    with_teacher: bool = False,
    seeds: int = 4,
    first_seed: int = 0,
) -> Plan:
    """Return what a run measures; the arguments are those of `evaluate`.

    Raises:
        UserError: numbers that allow no measurement, or a metric whose needs the prompt set does not meet.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"seeds must be a whole number from 1 to {MOST_SEEDS}, not {seeds}")
    groups: list[GroupPlan] = []
    for index, group in enumerate(prompt_set.groups):
        if len(group.prompts) < 2:
            raise UserError(f"an evaluation needs at least 2 prompts, not {len(group.prompts)}")
        own = _metrics(prompt_set.name, group, metrics if index == 0 else (), with_teacher)
        per_prompt = group.images_per_prompt or seeds
        first = first_seed + group.seed_offset
        if not 0 <= first <= LAST_SEED + 1 - len(group.prompts) * per_prompt or first_seed < 0:
            raise UserError(f"the seeds of all images must lie from 0 to {LAST_SEED}, not from {first}")
        groups.append(GroupPlan(group, own, per_prompt, first))
    return Plan(prompt_set, tuple(groups), seeds, first_seed)


def evaluate(
    candidates: Sequence[Candidate],
    prompt_set: PromptSet,
    folder: Path,
    *,
    teacher: str | None = None,
    metrics: Sequence[MetricFactory] = (),
    seeds: int = 4,
    first_seed: int = 0,
    extractor: Extractor | None = None,
    command: str = "",
    on_progress: Progress = silent,
) -> Results:
    """Measure candidates on a prompt set and, where there is a teacher, against its images.

    Every image has a seed of its own, the same for every candidate. So candidates are compared on the same
    noise, while images of different prompts never share any.

    Args:
        candidates: the models, labels unique.
        prompt_set: the prompts, with their truth and real images.
        folder: receives ``results.json``, ``results.md``, an image grid per model and group
            (``sheet-LABEL.png``, ``GROUP-LABEL.png``), and ``cache/``.
        teacher: label of the candidate that the others are compared with.
        metrics: measured on the first group of prompts; the prompt set's own when empty.
        seeds: images per prompt, where the prompt set does not say.
        first_seed: seed of the first image; the others count up from it.
        extractor: computes features; `OpenNsfwPool` when absent.
        command: the command line, for the results.
        on_progress: called before every chunk of images.

    Raises:
        UserError: labels that clash, an unknown teacher, numbers that allow no measurement, a metric whose
            needs are not met, or a folder that cannot be written.
    """
    labels = [candidate.label for candidate in candidates]
    _check_labels(labels, teacher)
    planned = plan(
        prompt_set, metrics=metrics, with_teacher=teacher is not None, seeds=seeds, first_seed=first_seed
    )
    features = (extractor or OpenNsfwPool()) if planned.needs_features else None
    cache = Cache(folder / "cache")
    images = ImageCache(features, cache, Cache(prompt_set.cache) if prompt_set.cache else cache, on_progress)
    measured = [measure(group, candidates, teacher, images) for group in planned.groups]
    rows = _merge(labels, (row for group in measured for row in group.rows))
    tables = [
        GroupTables(_tables(group.plan.group, group.rows, chosen=bool(metrics) and index == 0), group.images)
        for index, group in enumerate(measured)
    ]
    results = Results(
        extractor=features.name if features else None,
        teacher=teacher,
        prompt_set=prompt_set.name,
        description=prompt_set.description,
        prompts=len(prompt_set.groups[0].prompts),
        seeds=seeds,
        first_seed=first_seed,
        facts=prompt_set.facts,
        rows=rows,
        tables=tuple(tables),
        command=command,
        versions=versions(),
    )
    grids = {name: grid for group in measured for name, grid in group.grids.items()}
    write(results, folder, grids)
    return results


def _check_labels(labels: list[str], teacher: str | None) -> None:
    if not labels:
        raise UserError("there is no model to evaluate")
    # Cache folders and image grids are named after slugs, so these must differ.
    if len({slug(label) for label in labels}) < len(labels):
        raise UserError(f"each model can be evaluated once a run: {', '.join(labels)}")
    if teacher is not None and teacher not in labels:
        raise UserError(f"the teacher {teacher} is not among the models of this run: {', '.join(labels)}")


def _metrics(
    name: str, group: PromptGroup, chosen: Sequence[MetricFactory], with_teacher: bool
) -> tuple[MetricFactory, ...]:
    """Return the metrics of a group: those chosen, else its own, else the default ones that can run."""
    met = {
        FEATURES: True,
        REFERENCES: len(group.references) > 0,
        TRUTH: all(prompt.truth is not None for prompt in group.prompts),
        TEACHER: with_teacher,
    }
    for metric in chosen:
        for need in sorted(metric.needs):
            if not met[need]:
                metric_name = getattr(metric, "__name__", type(metric).__name__)
                lack = "this run has none" if need == TEACHER else f"the prompt set {name} has none"
                raise UserError(f"the metric {metric_name} needs {_WORDS[need]}: {lack}")
    wanted = chosen or (DEFAULT if group.metrics is None else group.metrics)
    runs = tuple(metric for metric in wanted if all(met[need] for need in metric.needs))
    if not runs:
        raise UserError(f"no metric has what it needs of the prompt set {name}: name one with --metric")
    return runs


_WORDS = {
    REFERENCES: "reference images",
    TRUTH: "a truth for every prompt",
    TEACHER: "a teacher",
}


def _merge(labels: Sequence[str], rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return one row per label with the figures of all groups, the ceilings before the models."""
    merged: dict[str, Row] = {}
    for row in rows:
        first = merged.get(row.label, Row(row.label, row.images, {}))
        merged[row.label] = Row(first.label, first.images, first.figures | row.figures)
    return (
        *(row for label, row in merged.items() if label not in labels),
        *(merged[label] for label in labels),
    )


def _tables(group: PromptGroup, rows: Sequence[Row], *, chosen: bool) -> Sequence[Table]:
    """Return a group's own tables, and one of all other figures where it has none or metrics were chosen."""
    if group.tables and not chosen:
        return group.tables
    known = {name for table in group.tables for _, name, _ in table.columns}
    others = dict.fromkeys(name for row in rows for name in row.figures if name not in known)
    title = "Further figures:" if group.tables else f"{group.name}:".capitalize() if group.name else ""
    return [*group.tables, Table([(name, name, 1.0) for name in others], title)]
