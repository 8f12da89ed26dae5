"""The tables of the benchmark, from its result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

COLUMNS = (
    ("Fréchet distance", "frechet", 1.0, 1),
    ("to the teacher", "frechet_teacher", 1.0, 1),
    ("pixels", "frechet_pixels", 1.0, 1),
    ("untrained", "frechet_untrained", 1.0, 2),
    ("accuracy, %", "accuracy", 100.0, 1),
    ("precision, %", "precision", 100.0, 0),
    ("recall, %", "recall", 100.0, 0),
    ("diversity, %", "diversity", 100.0, 0),
    ("energy", "energy", 1.0, 3),
)
"""Title, name, factor and digits of the figures of a table."""


@dataclass(frozen=True)
class Spread:
    """Replicates of a figure: their mean, standard deviation, and the half width of the mean's 95 % interval.

    The interval is Student's over the replicates; it is infinite for one.
    """

    mean: float
    deviation: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values."""
        count = len(values)
        if count == 1:
            return cls(values[0], float("nan"), float("inf"), 1)
        from scipy.stats import t

        deviation = stdev(values)
        half = float(t.ppf(0.975, count - 1)) * deviation / count**0.5
        return cls(mean(values), deviation, half, count)

    def text(self, digits: int) -> str:
        """Return ``mean ± deviation``."""
        if self.count == 1:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"

    def interval(self, digits: int) -> str:
        """Return ``mean [low, high]``."""
        if self.count == 1:
            return f"{self.mean:+.{digits}f}"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


Results = Sequence[Mapping[str, Any]]
"""Records of result files."""


def value(record: Mapping[str, Any], name: str, update: int | None = None) -> float:
    """Return a figure of a record, of its last point or of that at an update."""
    points = record["curve"]
    point = points[-1] if update is None else next(each for each in points if each["update"] == update)
    return float(point["figures"][name]["value"])


def replicates(results: Results, row: str, steps: int) -> dict[int, Mapping[str, Any]]:
    """Return the records of a row by replicate, without those that served a choice."""
    found = [each for each in results if each["made_of"]["row"] == row]
    found = [each for each in found if each["made_of"]["student_steps"] == steps]
    return {each["made_of"]["replicate"]: each for each in found if not each["made_of"]["choice"]}


def paired(
    one: Mapping[int, Mapping[str, Any]],
    other: Mapping[int, Mapping[str, Any]],
    name: str,
    update: int | None = None,
) -> Spread | None:
    """Return the difference of two rows in a figure, by replicate; ``None`` where they share none."""
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    return Spread.of([value(one[each], name, update) - value(other[each], name) for each in shared])


def table(results: Results, rows: Sequence[str], steps: int, against: str, update: int | None = None) -> str:
    """Return a table in Markdown.

    Args:
        results: records of result files.
        rows: names of the rows, in order; rows without a result are left out.
        steps: sampling steps of the students.
        against: name of the row that the primary measure is compared with.
        update: the update to show; ``None`` shows each row's last.
    """
    titles = ["method", "rate", "updates", "replicates", f"minus {against} [95 %]"]
    titles += [title for title, *_ in COLUMNS]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    base = replicates(results, against, steps)
    for row in rows:
        own = replicates(results, row, steps)
        own = {key: each for key, each in own.items() if update is None or _has(each, update)}
        if not own:
            continue
        first = next(iter(own.values()))
        rate, updates = first["made_of"].get("rate"), first["curve"][-1]["update"]
        difference = None if row == against else paired(own, base, "frechet", update)
        cells = [row, f"{rate:g}" if rate else "", str(update or updates), str(len(own))]
        cells.append("" if difference is None else difference.interval(1))
        for _, name, factor, digits in COLUMNS:
            if name in first["curve"][-1]["figures"]:
                spread = Spread.of([factor * value(each, name, update) for each in own.values()])
                cells.append(spread.text(digits))
            else:
                cells.append("")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def split_table(results: Results) -> str:
    """Return the comparison of split and plain fine-tuning, in Markdown; empty without results."""
    plain, split = (replicates(results, f"fine-tuning, {kind}", 4) for kind in ("plain", "split"))
    shared = sorted(plain.keys() & split.keys())
    if not shared:
        return ""
    before = {each: value(plain[each], "frechet", 0) for each in shared}
    rows: dict[str, dict[int, float]] = {"before": before}
    updates = [point["update"] for point in plain[shared[0]]["curve"] if point["update"]]
    for update in updates:
        rows[f"plain, {update} updates"] = {each: value(plain[each], "frechet", update) for each in shared}
    chosen = [split[each]["chosen"] for each in shared]
    rows[f"split, merged with {', '.join(f'{each:g}' for each in chosen)} of late (chosen)"] = {
        each: value(split[each], "frechet") for each in shared
    }
    for index, ratio in enumerate(point["late"] for point in split[shared[0]]["ratios"]):
        rows[f"split, merged with {ratio:g} of late"] = {
            each: float(split[each]["ratios"][index]["figures"]["frechet"]["value"]) for each in shared
        }
    base_name = f"plain, {updates[0]} updates"
    lines = [f"| | Fréchet distance | minus {base_name} [95 %] |", "|---|---:|---:|"]
    base = rows[base_name]
    for name, own in rows.items():
        difference = Spread.of([own[each] - base[each] for each in shared])
        lines.append(f"| {name} | {Spread.of(list(own.values())).text(1)} | {difference.interval(1)} |")
    return "\n".join(lines)


def gradient_table(results: Results) -> str:
    """Return noise and bias of gradients along training, in Markdown; empty without results."""
    own = [each for each in results if each["made_of"]["row"].startswith("gradient, ")]
    if not own:
        return ""
    steps = [int(each["step"]) for each in own[0]["measured"]]
    titles = [f"{name} at {step}" for name in ("noise", "cosine", "bias") for step in steps]
    lines = ["| score point, target | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for row in dict.fromkeys(each["made_of"]["row"] for each in own):
        cells = [row.removeprefix("gradient, ")]
        measured = [each["measured"] for each in own if each["made_of"]["row"] == row]
        for name in ("noise", "cosine", "bias"):
            for index in range(len(steps)):
                found = [each[index][name] for each in measured if each[index][name] is not None]
                cells.append(Spread.of(found).text(2) if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(results: Results, rows: Sequence[str], steps: int) -> str:
    """Return a table of the Fréchet distance along the training, in Markdown."""
    updates = sorted(
        {
            point["update"]
            for row in rows
            for each in replicates(results, row, steps).values()
            for point in each["curve"]
        }
    )
    lines = ["| method | " + " | ".join(str(update) for update in updates) + " |"]
    lines.append("|---|" + "---:|" * len(updates))
    for row in rows:
        own = replicates(results, row, steps)
        if not own:
            continue
        cells = [row]
        for update in updates:
            values = [value(each, "frechet", update) for each in own.values() if _has(each, update)]
            cells.append(Spread.of(values).text(1) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _has(record: Mapping[str, Any], update: int) -> bool:
    return any(point["update"] == update for point in record["curve"])
