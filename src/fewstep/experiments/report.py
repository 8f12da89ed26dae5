"""The document that ``fewstep ablate`` writes: a table of all cells, and the ratio of every merge."""

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
"""The row that the others are compared with: a longer warm start with the same compute."""

KID, KID_DIFFERENCE = "kid_teacher", "kid_teacher_less"
COLUMNS = (
    ("KID-T × 1000", KID, 1000),
    (f"minus {CONTROL}'s", KID_DIFFERENCE, 1000),
    ("seen top-5, %", "seen_top5", 100),
    ("held-out top-5, %", "held_out_top5", 100),
    ("scenes, %", "scene", 100),
    ("diversity, % of teacher", "diversity_ratio", 100),
)
Run = tuple[str, int, Path]
"""Name of a row, sampling steps of its student, folder of the run."""


@dataclass(frozen=True)
class Figure:
    """A figure of a model in ``results.json``."""

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
    """The content of ``results.json``."""

    rows: list[_Row]
    teacher: str | None
    seen: int
    held_out: int
    seeds: int
    extractor: str
    scenes: int = 0


@dataclass(frozen=True)
class _Merge:
    """The content of ``merge.json``: the score of every ratio."""

    metric: str
    curve: Annotated[list[tuple[float, float]], Meta(min_length=1)]


def read_results(path: Path) -> dict[str, Any]:
    """Read the results of one ``fewstep evaluate``.

    Raises:
        UserError: the file cannot be read, or has other keys.
    """
    results: dict[str, Any] = json_io.read(path, python=True)
    json_io.convert(results, _Results, str(path))
    return results


def document(runs: Sequence[Run], results: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """Return all cells as Markdown.

    Args:
        runs: the cells.
        results: of one ``fewstep evaluate``.
        facts: compute, machine, number of jobs and the command.

    Raises:
        UserError: the results are of other runs, or a file is damaged.
    """
    by_label = {row["label"]: row["figures"] for row in results["rows"]}
    teacher = results["teacher"]
    for label in (teacher, *(f"{folder / 'model'}@{steps}" for _, steps, folder in runs)):
        if label not in by_label:
            raise UserError(f"the results have no figures of {label}: evaluate again")
    counts = (
        f"{results['seen']} seen and {results['held_out']} held-out prompts, {results['seeds']} images "
        f"each, {results.get('scenes', 0)} scenes; features {results['extractor']}."
    )
    parts = [
        "# Results",
        f"Written by `fewstep ablate pocket`. One teacher ({teacher}), one warm start for all students of "
        f"the same number of steps, the same data, noise and compute: {facts['compute']}.",
        f"{counts} A figure is the mean over training seeds ± their standard deviation. With a single seed, "
        f"the 95 % interval over prompts stands in brackets. Minus {CONTROL}'s: the difference of two KID-T "
        "on the same prompts and noise, with its 95 % interval over prompts and seeds together (Student's "
        "t). Below 0 is better.",
        f"Minutes are the total time of a training, with the start of its processes and all resumptions, on "
        f"{facts['machine']}, {facts['jobs']} at once; ≥ if a process was killed and part of its time is "
        "unknown. Peak is the largest memory of its process on the host.",
    ]
    for steps in sorted({steps for _, steps, _ in runs}, reverse=True):
        parts += [f"## {steps} steps", _table(runs, steps, by_label, teacher, COLUMNS, costs=True)]
        scenes = tuple((name, f"scene_{name}", 100) for name in CATEGORIES)
        if any("scene" in figures for figures in by_label.values()):
            parts += ["Scenes by category, %:", _table(runs, steps, by_label, teacher, scenes, costs=False)]
    curves = [(name, steps, folder) for name, steps, folder in runs if (folder / "merge.json").is_file()]
    if curves:
        parts += ["## The merge's ratio", _curves(curves)]
    parts += ["## Reproduce", f"```sh\n{facts['command']}\n```"]
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
    cells = [_cell([by_label[teacher]], key, scale) for _, key, scale in columns]
    lines.append(["teacher", *cells, *(("", "") if costs else ())])

    def measured(folders: Sequence[Path]) -> list[Mapping[str, Any]]:
        return [by_label[f"{folder / 'model'}@{steps}"] for folder in folders]

    control = measured([folder for n, s, folder in runs if (n, s) == (CONTROL, steps)])
    for name in names:
        folders = [folder for n, s, folder in runs if (n, s) == (name, steps)]
        figures = measured(folders)
        if control and name != CONTROL and (difference := _kid_difference(figures, control)) is not None:
            figures = [{**figures[0], KID_DIFFERENCE: difference}, *figures[1:]]
        row = [name, *(_cell(figures, key, scale) for _, key, scale in columns)]
        if costs:
            recorded = [read_cost(folder / "cost.json") for folder in folders]
            at_least = "≥ " if any(note.cut for note in recorded) else ""
            row.append(f"{at_least}{mean(note.seconds for note in recorded) / 60:.1f}")
            row.append(f"{max(note.bytes for note in recorded) / 1e6:.0f}")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _kid_difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    """Return the difference of two KID-T, means over seeds, with its interval over paired prompts and seeds.

    The interval uses Student's t with the degrees of freedom of Welch and Satterthwaite, because the spread
    of a few seeds is not known well.
    """
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
    """Return the two-sided 95 % quantile of Student's t for variances with their degrees of freedom."""
    from scipy.stats import t

    spread = sum(part**2 / free for part, free in parts)
    free = sum(part for part, _ in parts) ** 2 / spread if spread else np.inf
    return float(t.ppf((1 + LEVEL) / 2, free))


def _cell(figures: Sequence[Mapping[str, Any]], key: str, scale: float) -> str:
    found = [each[key] for each in figures if key in each]
    if not found:
        return ""
    values = [scale * each["value"] for each in found]
    if len(values) > 1:
        return f"{mean(values):.3g} ± {stdev(values):.2g}"
    ends = [each for each in (found[0]["low"], found[0]["high"]) if each is not None]
    return f"{values[0]:.3g}" + (f" [{', '.join(f'{scale * end:.3g}' for end in ends)}]" if ends else "")


def _curves(runs: Sequence[Run]) -> str:
    """Return the score of every ratio, one row per run."""
    merges = [(*run, json_io.read(run[2] / "merge.json", _Merge, python=True)) for run in runs]
    ratios = [f"{ratio:g}" for ratio, _ in merges[0][3].curve]
    lines = [["late branch's share", *ratios], ["---", *["---:"] * len(ratios)]]
    for name, steps, folder, note in merges:
        scores = [f"{score:.2f}" for _, score in note.curve]
        seed = folder.name.rpartition(".")[2]
        lines.append([f"{name}, {steps} steps, seed {seed}: {note.metric}", *scores])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
