"""The document that ``fewstep ablate`` writes: figures of every cell, means over seeds, and what merging
brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.stats import LEVEL, Z, jackknife
from fewstep.core.types import UserError
from fewstep.experiments.subprocesses import read_cost
from fewstep.pocket.geneval_prompts import CATEGORIES

CONTROL = "trajectory"
"""The row that the others are compared with: the same compute spent on going on with the warm start."""

KID, LESS = "kid_teacher", "kid_teacher_less"
COLUMNS = (
    ("KID-T × 1000", KID, 1000),
    (f"less {CONTROL}'s", LESS, 1000),
    ("seen top-5, %", "seen_top5", 100),
    ("held-out top-5, %", "held_out_top5", 100),
    ("scenes, %", "scene", 100),
    ("diversity, % of teacher", "diversity_ratio", 100),
)
Run = tuple[str, int, Path]
"""Name of a row, steps of its student, folder of the run."""


@dataclass(frozen=True)
class Figure:
    """A figure of a model, as ``results.json`` has it."""

    value: float
    low: float | None
    high: float | None
    without: list[float] | None = None


@dataclass(frozen=True)
class _Row:
    label: str
    figures: dict[str, Figure]


@dataclass(frozen=True)
class _Results:
    """The shape of ``results.json``."""

    rows: list[_Row]
    teacher: str | None
    seen: int
    held_out: int
    seeds: int
    extractor: str
    scenes: int = 0


@dataclass(frozen=True)
class _Merge:
    """The shape of ``merge.json``: the score of every ratio."""

    metric: str
    curve: Annotated[list[tuple[float, float]], Meta(min_length=1)]


@dataclass(frozen=True)
class _Noise:
    """The shape of what ``fewstep gradient-noise`` writes."""

    batch: int
    measured: Annotated[list[dict[str, float]], Meta(min_length=1)]


def read_results(path: Path) -> dict[str, Any]:
    """The results of one ``fewstep evaluate``.

    Raises:
        UserError: the file cannot be read, or has another shape.
    """
    told: dict[str, Any] = json_io.read(path, python=True)
    json_io.convert(told, _Results, str(path))
    return told


def document(
    runs: Sequence[Run], results: Mapping[str, Any], facts: Mapping[str, str], noise: Path | None = None
) -> str:
    """Markdown of all cells, from the results of one ``fewstep evaluate`` and the note of ``fewstep
    variance``, where there is one.

    Raises:
        UserError: the results are of other runs, or a note is damaged.
    """
    by_label = {row["label"]: row["figures"] for row in results["rows"]}
    teacher = results["teacher"]
    for label in (teacher, *(f"{folder / 'model'}@{steps}" for _, steps, folder in runs)):
        if label not in by_label:
            raise UserError(f"the results have no figures of {label}: measure again")
    counts = (
        f"{results['seen']} seen and {results['held_out']} held-out prompts, {results['seeds']} pictures "
        f"each, {results.get('scenes', 0)} scenes; features {results['extractor']}."
    )
    parts = [
        "# Results",
        f"Written by `fewstep ablate`. One teacher ({teacher}), one warm start for all students of as many "
        f"steps, the same data, noise and compute: {facts['compute']}.",
        f"{counts} A figure is the mean over the training's seeds ± their standard deviation; where there is "
        f"one, the 95 % interval over prompts stands in brackets. Less {CONTROL}'s: the difference of two "
        "KID-T on the same prompts and noise, with its 95 % interval over prompts and seeds together "
        "(Student's t); below 0 is better.",
        f"Minutes are a training's whole time, its processes' start included, over all the times that it was "
        f"begun, on {facts['machine']}, {facts['jobs']} at once; ≥ where one was killed and part of its time "
        "is not known. Peak is the most memory of its process on the host.",
    ]
    for steps in sorted({steps for _, steps, _ in runs}, reverse=True):
        parts += [f"## {steps} steps", _table(runs, steps, by_label, teacher, COLUMNS, costs=True)]
        scenes = tuple((name, f"scene_{name}", 100) for name in CATEGORIES)
        if any("scene" in figures for figures in by_label.values()):
            parts += ["Scenes by category, %:", _table(runs, steps, by_label, teacher, scenes, costs=False)]
    curves = [(name, steps, folder) for name, steps, folder in runs if (folder / "merge.json").is_file()]
    if curves:
        parts += ["## The merge's ratio", _curves(curves)]
    if noise is not None and noise.is_file():
        parts += ["## The noise of the matching gradient", *_noise(noise)]
    parts += ["## The same again", f"```sh\n{facts['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def _table(
    runs: Sequence[Run],
    steps: int,
    by_label: Mapping[str, Any],
    teacher: str,
    columns: Sequence[tuple[str, str, float]],
    *,
    costs: bool,
) -> str:
    names = list(dict.fromkeys(name for name, its, _ in runs if its == steps))
    titles = ["", *(title for title, _, _ in columns), *(("minutes", "peak RSS, MB") if costs else ())]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    own = by_label[teacher]
    cells = [_cell([own], key, scale) for _, key, scale in columns]
    lines.append(["teacher", *cells, *(("", "") if costs else ())])

    def measured(folders: Sequence[Path]) -> list[Mapping[str, Any]]:
        return [by_label[f"{folder / 'model'}@{steps}"] for folder in folders]

    control = measured([folder for n, s, folder in runs if (n, s) == (CONTROL, steps)])
    for name in names:
        folders = [folder for n, s, folder in runs if (n, s) == (name, steps)]
        figures = measured(folders)
        if control and name != CONTROL and (less := _less(figures, control)) is not None:
            figures = [{**figures[0], LESS: less}, *figures[1:]]
        row = [name, *(_cell(figures, key, scale) for _, key, scale in columns)]
        if costs:
            notes = [read_cost(folder / "cost.json") for folder in folders]
            least = "≥ " if any(note.cut for note in notes) else ""
            row.append(f"{least}{mean(note.seconds for note in notes) / 60:.1f}")
            row.append(f"{max(note.bytes for note in notes) / 1e6:.0f}")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _less(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Our KID-T, mean over seeds, less theirs: its uncertainty over prompts, paired, and over seeds. A few
    seeds say little of their own spread: Student's t, its degrees of freedom by Welch and Satterthwaite."""
    sides = [[each[KID] for each in side if KID in each] for side in (ours, theirs)]
    if not all(side and all("without" in each for each in side) for side in sides):
        return None
    values = [[each["value"] for each in side] for side in sides]
    without = [np.mean([each["without"] for each in side], axis=0) for side in sides]
    value = mean(values[0]) - mean(values[1])
    prompts = (jackknife(value, without[0] - without[1]).high - value) / Z
    parts = [(prompts**2, len(without[0]) - 1)]
    parts += [(stdev(side) ** 2 / len(side), len(side) - 1) for side in values if len(side) > 1]
    half = _quantile(parts) * sum(part for part, _ in parts) ** 0.5
    return {"value": value, "low": value - half, "high": value + half}


def _quantile(parts: Sequence[tuple[float, int]]) -> float:
    """Two-sided 95 % quantile for a sum of variances, each known with so many degrees of freedom."""
    from scipy.stats import t

    spread = sum(part**2 / free for part, free in parts)
    free = sum(part for part, _ in parts) ** 2 / spread if spread else np.inf
    return float(t.ppf((1 + LEVEL) / 2, free))


def _cell(figures: Sequence[Mapping[str, Any]], key: str, scale: float) -> str:
    told = [each[key] for each in figures if key in each]
    if not told:
        return ""
    values = [scale * each["value"] for each in told]
    if len(values) > 1:
        return f"{mean(values):.3g} ± {stdev(values):.2g}"
    ends = [each for each in (told[0]["low"], told[0]["high"]) if each is not None]
    return f"{values[0]:.3g}" + (f" [{', '.join(f'{scale * end:.3g}' for end in ends)}]" if ends else "")


def _curves(runs: Sequence[Run]) -> str:
    """Scores of every ratio, a row a run."""
    told = [(*run, json_io.read(run[2] / "merge.json", _Merge, python=True)) for run in runs]
    ratios = [f"{ratio:g}" for ratio, _ in told[0][3].curve]
    lines = [["late branch's share", *ratios], ["---", *["---:"] * len(ratios)]]
    for name, steps, folder, note in told:
        scores = [f"{score:.2f}" for _, score in note.curve]
        seed = folder.name.rpartition(".")[2]
        lines.append([f"{name}, {steps} steps, seed {seed}: {note.metric}", *scores])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _noise(path: Path) -> list[str]:
    """The share of noise along a training, a row for every place of the scores."""
    note = json_io.read(path, _Noise, python=True)
    told = note.measured
    if any(each.keys() != told[0].keys() or "step" not in each for each in told):
        raise UserError(f"{path} is damaged: its measurements are not of the same places")
    lines = [
        ["scores taken", *(f"{each['step']:.0f} updates" for each in told)],
        ["---", *["---:"] * len(told)],
    ]
    for place in (key for key in told[0] if key != "step"):
        lines.append([place, *(f"{each[place]:.2f}" for each in told)])
    return [
        "Trace of the gradient's covariance over its mean square, along a training by renoised estimates, "
        f"batches of {note.batch}: 0 is no noise, 1 is nothing else.",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]
