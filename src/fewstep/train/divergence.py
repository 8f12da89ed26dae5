"""Stops a run that diverges while all its numbers are finite.

Methods return detached figures beside their losses, and the log's lines are their means. A figure is compared
with its first values. Out of bounds for several consecutive lines, it stops the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from fewstep.core.types import UserError

FIRST = 5
"""Lines of the log whose median is the reference of a figure; they are not checked."""

PATIENCE = 5
"""Consecutive lines for which a figure must be out of bounds."""


@dataclass(frozen=True)
class Bound:
    """The range of a figure.

    Attributes:
        figure: its name; names that continue with a slash are included.
        least: smallest ratio to the reference.
        most: largest ratio to the reference.
        away: if set, the largest distance from the reference instead.
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
"""Latents have about unit variance; a shift by half a standard deviation changes the colour of all images.
A proxy's loss rises a little while the student sharpens; three times its first value is worse than predicting
zero."""


@dataclass
class DivergenceMonitor:
    """Checks the lines of the log against the bounds.

    It has no state to save: a resumed run gives it the lines that are there.
    """

    bounds: tuple[Bound, ...] = BOUNDS
    _first: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _out: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def load_history(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Read the lines of an earlier run. They do not stop this one, so that a stopped run can recover."""
        for line in lines:
            self._read(line)
        self._out.clear()

    def check(self, step: int, line: Mapping[str, float]) -> None:
        """Check a new line.

        Raises:
            UserError: a figure has been out of bounds for :data:`PATIENCE` lines.
        """
        for name, bound in self._read(line):
            first = median(self._first[name])
            raise UserError(
                f"step {step}: {name} is {line[name]:.3g}, began as {first:.3g} and has been {bound} for "
                f"{PATIENCE} lines of the log: {bound.means}"
            )

    def _read(self, line: Mapping[str, float]) -> list[tuple[str, Bound]]:
        """Count a line; return the figures that have been out of bounds for too long."""
        diverged: list[tuple[str, Bound]] = []
        for name, value in line.items():
            for bound in self.bounds:
                if name != bound.figure and not name.startswith(bound.figure + "/"):
                    continue
                if len(self._first[name]) < FIRST:
                    self._first[name].append(value)
                    continue
                within = bound.holds(value, median(self._first[name]))
                self._out[name] = 0 if within else self._out[name] + 1
                if self._out[name] >= PATIENCE:
                    diverged.append((name, bound))
        return diverged
