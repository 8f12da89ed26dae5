"""Plots benchmark records: latency by device, and quality against latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from msgspec import Meta

from fewstep.core import json_io
from fewstep.core.atomic import replacing_file
from fewstep.core.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Line = Mapping[str, Any]


Count = Annotated[int, Meta(ge=1, le=10**6)]
Amount = Annotated[float, Meta(ge=0, le=1e18)]


@dataclass(frozen=True)
class _Seconds:
    whole: Annotated[list[Annotated[float, Meta(gt=0, le=1e9)]], Meta(min_length=1)]


@dataclass(frozen=True)
class _Device:
    processor: str
    cores: Count


@dataclass(frozen=True)
class _Record:
    """The fields of a record that are plotted."""

    model: str
    engine: str
    steps: Count
    batch: Count
    peak: Amount
    seconds: _Seconds
    device: _Device
    bits: Count | None = None
    threads: Annotated[int, Meta(ge=0)] | None = None
    guidance: Amount | None = None
    floor: dict[str, Amount] | None = None


@dataclass(frozen=True)
class _Figure:
    value: float


@dataclass(frozen=True)
class _Row:
    label: str
    figures: dict[str, _Figure]


@dataclass(frozen=True)
class _Results:
    """The fields of a ``results.json`` that are plotted."""

    rows: list[_Row]


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the records of files of JSON lines.

    Raises:
        UserError: a file cannot be read, or a line is no record.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        for number, line in enumerate(json_io.read_lines(path), 1):
            try:
                json_io.convert(line, _Record, "it")
            except UserError as error:
                raise UserError(f"{path}, line {number}: no record of fewstep bench ({error})") from None
            found.append(line)
    if not found:
        raise UserError("there is no record to plot")
    return found


def label(record: Line) -> str:
    """Return the label of a record."""
    batch = f", {record['batch']} at once" if record["batch"] > 1 else ""
    return f"{_model(record)}, {record['steps']} steps{batch}"


def latency(records: Sequence[Line], path: Path) -> None:
    """Plot seconds per image of every engine, by device. A line in the bar is the roofline bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    devices = list(dict.fromkeys(_device(record) for record in records))
    figure, axes = plt.subplots(
        len(devices), 1, squeeze=False, figsize=(9, 1 + 0.45 * len(records) + 0.6 * len(devices)),
        height_ratios=[sum(_device(r) == name for r in records) + 1 for name in devices],
    )  # fmt: skip
    for axis, name in zip(axes[:, 0], devices, strict=True):
        own = sorted((r for r in records if _device(r) == name), key=lambda r: -_seconds(r))
        for place, record in enumerate(own):
            axis.barh(
                place, _seconds(record), color="#4c78a8" if "fewstep" in record["engine"] else "#bbbbbb"
            )
            axis.text(_seconds(record), place, f" {_seconds(record):.3g} s", va="center", fontsize=8)
            if record.get("floor"):
                least = sum(record["floor"].values()) / record["batch"]
                axis.plot([least, least], [place - 0.4, place + 0.4], color="black", lw=1.5)
        axis.set_yticks(range(len(own)), [label(record) for record in own], fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds per image, warm (black: roofline bound)")
    _write(figure, path)


def quality(records: Sequence[Line], scores: Mapping[str, float], name: str, path: Path) -> None:
    """Plot quality against latency. A bubble's area is the memory of its process, its number the steps.

    The bubbles of a model have one colour and are joined in the order of their steps.

    Args:
        records: records whose ``MODEL@STEPS`` has no score are left out.
        scores: by ``MODEL@STEPS``, as ``fewstep evaluate`` labels them.
        name: of the score.
        path: of the plot.

    Raises:
        UserError: no record has a score.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scored = [(record, scores[_evaluated(record)]) for record in records if _evaluated(record) in scores]
    if not scored:
        raise UserError("none of the records is of a model that was evaluated, by its label MODEL@STEPS")
    several = len({_device(record) for record, _ in scored}) > 1
    curves: dict[str, list[tuple[Line, float]]] = {}
    for record, score in sorted(scored, key=lambda pair: pair[0]["steps"]):
        name_of = f"{_model(record)}{f' ({_device(record)})' if several else ''}"
        curves.setdefault(name_of, []).append((record, score))
    figure, axis = plt.subplots(figsize=(9, 5.5))
    colours: Any = plt.get_cmap("tab10")
    for order, (name_of, curve) in enumerate(curves.items()):
        x, y = [_seconds(record) for record, _ in curve], [score for _, score in curve]
        memory, colour = [record["peak"] for record, _ in curve], [colours(order % 10)]
        peak = f"{min(memory) / 1e9:.2f} GB" if len(curve) == 1 else f"{max(memory) / 1e9:.2f} GB at most"
        axis.plot(x, y, color=colour[0], alpha=0.4, lw=1)
        axis.scatter(x, y, [size / 2e6 for size in memory], colour, alpha=0.5, label=f"{name_of}: {peak}")
        for (record, score), seconds in zip(curve, x, strict=True):
            axis.annotate(str(record["steps"]), (seconds, score), ha="center", va="center", fontsize=7)
    # Beside the axes: bubbles of similar models overlap, and so would their labels.
    legend = axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        cast("Any", handle).set_sizes([60])
    axis.set_xscale("log")
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    axis.set_xlabel("seconds per image, warm (in the bubble: steps)")
    axis.set_ylabel(name)
    axis.margins(0.2)
    axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def scores_of(path: Path, name: str) -> dict[str, float]:
    """Return a figure of every model in a ``results.json`` of ``fewstep evaluate``, by label.

    Raises:
        UserError: the file cannot be read, or lacks the figure.
    """
    try:
        rows = json_io.read(path, _Results, python=True).rows
    except UserError as error:
        raise UserError(f"{path} is no results.json of fewstep evaluate ({error})") from None
    found = {row.label: row.figures[name].value for row in rows if name in row.figures}
    if odd := [label for label, value in found.items() if not math.isfinite(value)]:
        raise UserError(f"{path} says of {odd[0][:80]} that its {name} is {found[odd[0]]}")
    if not found:
        raise UserError(f"{path} has no figure {name}")
    return found


def _model(record: Line) -> str:
    """Return the label of a record's model and engine."""
    bits = f", {record['bits']} bit" if record.get("bits") else ""
    return _drawable(f"{Path(record['model']).name} {record['engine']}{bits}")


def _seconds(record: Line) -> float:
    return record["seconds"]["whole"][0] / record["batch"]


def _evaluated(record: Line) -> str:
    """Return the label of the model in ``fewstep evaluate``."""
    guidance = record.get("guidance")
    return f"{record['model']}@{record['steps']}" + ("" if guidance is None else f"x{guidance:g}")


def _device(record: Line) -> str:
    device = record["device"]
    return _drawable(f"{device['processor']}, {record.get('threads') or device['cores']} threads")


def _drawable(text: str) -> str:
    """Escape text for matplotlib: no lone surrogates, no formulas."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _write(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as fresh:
        figure.savefig(fresh, dpi=130, bbox_inches="tight")
    plt.close(figure)
