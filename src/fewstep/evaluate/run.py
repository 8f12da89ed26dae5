"""One run over several candidates: the same prompts, seeds and extractor, one set of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from fewstep.core.types import UserError
from fewstep.evaluate.array_cache import Cache
from fewstep.evaluate.candidates import Candidate, Plan, choose
from fewstep.evaluate.features import Extractor, OpenNsfwPool
from fewstep.evaluate.image_cache import ImageCache, Pictures, Progress, silent, slug
from fewstep.evaluate.metrics import compare_to_teacher, measure
from fewstep.evaluate.report import Results, Row, versions, write
from fewstep.images.grid import sheet
from fewstep.pocket import human_prompts
from fewstep.pocket.ceilings import Redraw
from fewstep.pocket.geneval import GenEvalTest
from fewstep.pocket.geneval_run import merge_rows, score
from fewstep.pocket.human_prompts import HumanPrompt
from fewstep.pocket.stickers import Reference

SHEET_PROMPTS = 12
SHEET_SEEDS = 4


def evaluate(
    candidates: Sequence[Candidate],
    references: Sequence[Reference],
    folder: Path,
    *,
    teacher: str | None = None,
    prompts: int = 200,
    seeds: int = 4,
    first_seed: int = 0,
    ceilings: Mapping[str, Redraw] | None = None,
    scenes: GenEvalTest | None = None,
    prose: Sequence[HumanPrompt] = (),
    extractor: Extractor | None = None,
    shared: Path | None = None,
    command: str = "",
    on_progress: Progress = silent,
) -> Results:
    """Measure candidates against real renderings and, where there is a teacher, against its pictures.

    Args:
        candidates: the models, labels unique.
        references: the renderings to retrieve among, all of one size; the prompts are drawn from them.
        folder: receives ``results.json``, ``results.md``, a ``sheet-LABEL.png`` each (with scenes, a
            ``scenes-LABEL.png`` too, and a ``written-LABEL.png`` with written prompts), and ``cache/``.
        teacher: label of the candidate that the others are compared with.
        prompts: how many prompts, half from seen and half from held-out pairs.
        seeds: pictures a prompt.
        first_seed: seed of the first picture; the others count up from it.
        ceilings: by label, what draws real renderings of the same pairs; measured as if they were generated.
        scenes: prompts of scenes to score besides, from :func:`fewstep.pocket.geneval.load`.
        prose: prompts that people wrote, to measure besides.
        extractor: features; the open_nsfw pool when absent.
        shared: where the features of renderings are kept, for several runs; ``folder/cache`` when absent.
        command: what was typed, for the record.
        on_progress: told about every chunk.

    Raises:
        UserError: no references, labels that clash, an unknown teacher, or a folder that cannot be written.
    """
    labels = [candidate.label for candidate in candidates]
    _check(labels, teacher)
    cache = Cache(folder / "cache")
    real = Cache(shared) if shared else cache
    producer = ImageCache(extractor or OpenNsfwPool(), cache, real, on_progress)
    plan = choose(references, prompts, seeds, first_seed)
    gallery = producer.real(references, "references")
    made = {candidate.label: producer.generated(candidate, plan) for candidate in candidates}
    rows = _ceilings(ceilings or {}, plan, gallery, references, producer)
    rows += _rows(made, plan, gallery, references, teacher)
    sheets = {f"sheet-{slug(label)}": _sheet(pictures, plan) for label, pictures in made.items()}
    if scenes is not None:
        scored = score(candidates, scenes, producer, teacher, first_seed)
        rows, pages = merge_rows(rows, scored.rows), scored.sheets
        sheets |= {f"scenes-{slug(label)}": page for label, page in pages.items()}
    if prose:
        own = human_prompts.score(candidates, prose, producer, gallery, references, teacher, first_seed)
        rows = merge_rows(rows, own.rows)
        sheets |= {f"written-{slug(label)}": page for label, page in own.sheets.items()}
    results = Results(
        extractor=producer.extractor.name,
        teacher=teacher,
        seen=sum(not reference.held_out for reference in plan.chosen),
        held_out=sum(reference.held_out for reference in plan.chosen),
        seeds=seeds,
        first_seed=first_seed,
        scenes=0 if scenes is None else len(scenes.scenes),
        written=len(prose),
        detector=None if scenes is None else scenes.detector,
        references=len(references),
        concepts=len({reference.concept for reference in references}),
        rows=tuple(rows),
        command=command,
        versions=versions(),
    )
    write(results, folder, sheets)
    return results


def _check(labels: list[str], teacher: str | None) -> None:
    if not labels:
        raise UserError("there is no model to evaluate")
    # Cache folders and sheets are named after slugs, so it is these that must differ.
    if len({slug(label) for label in labels}) < len(labels):
        raise UserError(f"each model can be evaluated once a run: {', '.join(labels)}")
    if teacher is not None and teacher not in labels:
        raise UserError(f"the teacher {teacher} is not among the models of this run: {', '.join(labels)}")


def _rows(
    made: dict[str, Pictures],
    plan: Plan,
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
    teacher: str | None,
) -> list[Row]:
    features = {label: _by_prompt(pictures.features, plan.seeds) for label, pictures in made.items()}
    measured = {label: measure(features[label], plan.chosen, gallery, references) for label in made}
    rows: list[Row] = []
    for label, own in measured.items():
        figures = dict(own.figures)
        if teacher is not None and label != teacher:
            figures |= compare_to_teacher(
                own, measured[teacher], features[label], features[teacher], plan.chosen
            )
        rows.append(Row(label, len(made[label].images), figures))
    return rows


def _ceilings(
    ceilings: Mapping[str, Redraw],
    plan: Plan,
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
    producer: ImageCache,
) -> list[Row]:
    """A row for each way to draw the plan's own pairs for real."""
    rows: list[Row] = []
    for label, redraw in ceilings.items():
        features = _by_prompt(producer.real(redraw(plan.chosen), label), 1)
        rows.append(Row(label, len(features), measure(features, plan.chosen, gallery, references).figures))
    return rows


def _by_prompt(features: NDArray[np.float32], seeds: int) -> NDArray[np.float32]:
    return features.reshape(-1, seeds, features.shape[-1])


def _sheet(pictures: Pictures, plan: Plan) -> Image:
    """The first prompts of either kind, a row each: the real rendering, then some seeds."""
    seen = [i for i, reference in enumerate(plan.chosen) if not reference.held_out]
    held = [i for i, reference in enumerate(plan.chosen) if reference.held_out]
    seeds = min(plan.seeds, SHEET_SEEDS)
    height, width = pictures.images.shape[2:]
    images: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    for index in seen[: SHEET_PROMPTS // 2] + held[: SHEET_PROMPTS // 2]:
        reference = plan.chosen[index]
        first = index * plan.seeds
        images += [_fit(reference.image, height, width), *pictures.images[first : first + seeds]]
        kind = "held out" if reference.held_out else "seen"
        labels += [f"real, {kind}", reference.prompt]
        labels += [f"seed {plan.first_seed + first + k}" for k in range(1, seeds)]
    return sheet(np.stack(images), labels, 1 + seeds)


def _fit(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image as Pillow

    picture = Pillow.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((width, height))
    return np.asarray(picture).transpose(2, 0, 1)
