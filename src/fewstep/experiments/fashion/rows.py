"""The rows of the benchmark's tables: methods, their options and the rates that are tried."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import product
from typing import Literal

from fewstep.core.types import UserError

MATCHING_RATES = (3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class Row:
    """A method with its options.

    Attributes:
        name: in tables.
        command: method and options of ``fewstep distill``.
        rates: learning rates that the sweep tries.
        start: what the student starts from: a warm start, or the teacher.
    """

    name: str
    command: tuple[str, ...]
    rates: tuple[float, ...] = MATCHING_RATES
    start: Literal["warm", "teacher"] = "warm"

    @property
    def slug(self) -> str:
        """The name as a part of file names."""
        words = "".join(c if c.isalnum() or c == "." else " " for c in self.name.lower())
        return "-".join(words.split())


def _matching(name: str, point: str, target: str, *more: str) -> Row:
    return Row(name, ("dmd", "--score-point", point, "--proxy-target", target, *more))


FLASH = ("flash", "--warm-start-steps", "0", "--split-steps", "0")
GAN = ("--gan-weight", "0.1")
EQUAL = ("--gradient-on", "velocity")
DMD2 = ("dmd", "--score-point", "renoise", "--proxy-target", "estimates", "--sampler", "renoise",
        "--fresh-rollouts", "--gan-weight", "0.005")  # fmt: skip


def flash_options(point: str, target: str, anchor: str) -> tuple[str, ...]:
    """Return the options of ``fewstep distill flash`` that set its losses.

    Args:
        point: where the scores are compared.
        target: what the proxy models.
        anchor: weight of trajectory guidance.
    """
    return (*GAN, "--score-point", point, "--proxy-target", target, "--trajectory-weight", anchor)


def _flash(name: str, point: str, target: str, anchor: str) -> Row:
    return Row(name, (*FLASH, *flash_options(point, target, anchor)))


TRAJECTORY = Row("trajectory, continued", ("trajectory",), (1e-4, 3e-4, 1e-3))

PRIMARY = (
    TRAJECTORY,
    Row("LCM", ("lcm",), (1e-4, 3e-4, 1e-3), "teacher"),
    Row("LADD", ("ladd",), (3e-6, 1e-5, 3e-5)),
    Row("DMD2", DMD2),
    Row("DMD2 + IDA (SenseFlow)", (*DMD2, "--ida-decay", "0.98")),
    Row("TDM", ("tdm", "--gradient-on", "x0")),
    _matching("DMD, renoised, finals", "renoise", "finals"),
    _matching("DMD, renoised, finals, equal weights", "renoise", "finals", *EQUAL),
    _matching("DMD, shared times, finals", "shared", "finals"),
    _matching("DMD, shared times, path", "shared", "path"),
    _matching("DMD, shared times, path, equal weights", "shared", "path", *EQUAL),
    _matching("DMD, shared freely, path", "shared-free", "path"),
    _flash("flash, shared times, path, heads", "shared", "path", "0"),
    _flash("flash, renoised, finals, heads", "renoise", "finals", "0"),
    _flash("flash, shared times, path, heads, anchor", "shared", "path", "3"),
)
"""The rows of the primary table."""

MAIN = ("trajectory, continued", "LCM", "DMD2", "TDM", "DMD, renoised, finals", "DMD, shared times, path",
        "flash, shared times, path, heads")  # fmt: skip
"""Names of the rows that are trained at fewer steps, too."""


def factorial() -> tuple[Row, ...]:
    """Return the rows of the factorial experiment: score point, target, anchor, weighting and heads."""
    rows: list[Row] = []
    either = (False, True)
    points, targets = ("shared", "shared-free", "renoise"), ("path", "finals", "estimates")
    factors = product(points, targets, either, either, either)
    for point, target, anchor, equal, gan in factors:
        words = [point, target, *(["anchor"] if anchor else []), *(["equal"] if equal else [])]
        words += ["heads"] if gan else []
        command = ["dmd", "--score-point", point, "--proxy-target", target]
        command += EQUAL if equal else ()
        command += ["--trajectory-weight", "3"] if anchor else []
        command += ["--gan-weight", "0.1", "--heads-weight", "0"] if gan else []
        rows.append(Row(f"factorial {' '.join(words)}", tuple(command)))
    return tuple(rows)


def own_row(text: str) -> Row:
    """Return the row of ``NAME=METHOD OPTIONS``, such as ``mine=my_package.my_method --weight 2``.

    Raises:
        UserError: the text has another form.
    """
    name, equals, command = text.partition("=")
    words = tuple(shlex.split(command))
    if not (name.strip() and equals and words):
        raise UserError(f"--row {text[:60]!r} is not of the form NAME=METHOD OPTIONS")
    return Row(name.strip(), words)


def select(rows: tuple[Row, ...], names: tuple[str, ...]) -> tuple[Row, ...]:
    """Return the rows of these names, or all if there are none.

    Raises:
        UserError: there is no such row.
    """
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: there is none; rows are {'; '.join(known)}")
    return tuple(known[name] for name in names) if names else rows
