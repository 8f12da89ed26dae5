"""What stops a run that learns the wrong thing while every number is finite.

Methods put detached figures beside their losses; the log's lines are their means. A figure is compared with
what it was in the first lines of the run, and out of bounds for some lines running it stops the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from fewstep.core.types import UserError

FIRST = 5
"""Lines of the log whose median is what a figure began as; nothing is judged in them."""

PATIENCE = 5
"""Lines running that a figure must be out of bounds."""


@dataclass(frozen=True)
class Bound:
    """How far a figure may go.

    Attributes:
        figure: its name; one that goes on with a slash is meant as well.
        least: of what it began as.
        most: of what it began as.
        away: or, where it is set, the distance from what it began as.
        means: what being out of bounds means, and what to do.
    """

    figure: str
    least: float = 0.0
    most: float = float("inf")
    away: float | None = None
    means: str = ""

    def holds(self, value: float, first: float) -> bool:
        if self.away is not None:
            return abs(value - first) <= self.away
        return self.least * first <= value <= self.most * first

    def __str__(self) -> str:
        if self.away is not None:
            return f"more than {self.away:g} away from it"
        return f"outside {self.least:g} to {self.most:g} times that"


BOUNDS = (
    Bound("latent/mean", away=0.5, means="the student's latents drift; lower --lr"),
    Bound("latent/std", least=0.5, most=2.0, means="the student's latents collapse or blow up; lower --lr"),
    Bound("proxy", most=3.0, means="the proxy has lost the student; let it learn oftener, or lower --lr"),
)
"""Latents have about unit variance: half a standard deviation is a shift of every picture's colour. A proxy's
loss rises a little while the student sharpens; three times its first value is worse than foretelling
nought."""


@dataclass
class DivergenceMonitor:
    """The bounds, applied to one line of the log after the other.

    It has no state to save: a resumed run shows it the lines that are there.
    """

    bounds: tuple[Bound, ...] = BOUNDS
    _first: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _out: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def load_history(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Take in earlier lines. They stop nothing: a run that was stopped has room to recover."""
        for line in lines:
            self._read(line)
        self._out.clear()

    def check(self, step: int, line: Mapping[str, float]) -> None:
        """Take in a new line.

        Raises:
            UserError: a figure has been out of its bounds for :data:`PATIENCE` lines.
        """
        for name, bound in self._read(line):
            first = median(self._first[name])
            raise UserError(
                f"step {step}: {name} is {line[name]:.3g}, began as {first:.3g} and has been {bound} for "
                f"{PATIENCE} lines of the log: {bound.means}"
            )

    def _read(self, line: Mapping[str, float]) -> list[tuple[str, Bound]]:
        """Count a line; the figures that have been out of bounds for too long."""
        gone: list[tuple[str, Bound]] = []
        for name, value in line.items():
            for bound in self.bounds:
                if name != bound.figure and not name.startswith(bound.figure + "/"):
                    continue
                if len(self._first[name]) < FIRST:
                    self._first[name].append(value)
                    continue
                good = bound.holds(value, median(self._first[name]))
                self._out[name] = 0 if good else self._out[name] + 1
                if self._out[name] >= PATIENCE:
                    gone.append((name, bound))
        return gone
