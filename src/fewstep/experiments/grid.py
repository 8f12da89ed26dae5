"""The rows of ``fewstep ablate``'s table, and how many updates of each an equal compute allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Cost = tuple[int, int]

SPLIT_SHARE = 0.3
"""Of the compute, where a part goes into split fine-tuning."""

MATCH: Cost = (1, 15 + 6)
"""The walk; five updates of the proxy; the student's step there and back, the guided teacher, the proxy."""

ESTIMATES: Cost = (1, 15 + 6 + 5)
"""The same, and a step of the student's for every update of the proxy."""

FLASH: Cost = (1 + 3, 6 + 3 + 6 + 3 + 3)
"""The walk, and the one there and back that is judged; two updates of the proxy; three features for the
heads; matching; the judged one's features; the anchor."""

SPLIT: Cost = (1 + 2 * 3 - 2, 2 + 6 + 3 + 2 * (6 + 3 + 3))
"""The same, but the student's turn is twice, for either branch. Of the walk that is judged for the early
branch, whose step is the last one, the steps before have no way back."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what the table calls it.
        method: of ``fewstep distill``.
        options: of the method, as typed.
        cost: passes of a net that one update takes for a sample: (a step of the student's, besides). A pass
            back counts as two, a guided teacher as two.
        split: the same of an update of split fine-tuning, for a row that has it.
    """

    name: str
    method: str
    options: tuple[str, ...] = ()
    cost: Cost = (0, 3)
    split: Cost | None = None

    def updates(self, passes: int, steps: int) -> dict[str, int]:
        """How many updates ``passes`` allow a student of so many steps, by the option that says so."""
        if self.split is None:
            return {"--steps": _allowed(passes, self.cost, steps)}
        late = round(passes * SPLIT_SHARE)
        return {
            "--split-steps": _allowed(late, self.split, steps),
            "--steps": _allowed(passes - late, self.cost, steps),
        }


def _allowed(passes: int, cost: Cost, steps: int) -> int:
    return max(1, round(passes / (cost[0] * steps + cost[1])))


FEW = ("--warm-start-steps", "0", "--proxy-updates", "2")

ROWS = (
    Row("trajectory", "trajectory"),
    Row("DMD2", "dmd", ("--score-point", "renoise", "--proxy-target", "estimates"), ESTIMATES),
    Row(
        "DMD, renoised, proxy on finals",
        "dmd",
        ("--score-point", "renoise", "--proxy-target", "finals"),
        MATCH,
    ),
    Row("DMD, shared times", "dmd", ("--score-point", "shared", "--proxy-target", "finals"), MATCH),
    Row(
        "DMD, times shared freely", "dmd", ("--score-point", "shared-free", "--proxy-target", "finals"), MATCH
    ),
    Row("DMD2 + SenseFlow's IDA", "dmd", ("--proxy-target", "estimates", "--ida-decay", "0.98"), ESTIMATES),
    Row("TDM", "tdm", (), MATCH),
    Row("LADD", "ladd", (), (1, 10)),
    Row("LCM", "lcm", (), (0, 6)),
    Row("flash", "flash", (*FEW, "--split-steps", "0"), FLASH),
    Row("flash, split and merged", "flash", FEW, FLASH, SPLIT),
)


@dataclass(frozen=True)
class Cell:
    """One training: a row at a number of steps with a seed."""

    row: Row
    steps: int
    seed: int

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.row.name.lower())
        return f"{'-'.join(filter(None, words.split('-')))}.{self.steps}.{self.seed}"

    def arguments(self, passes: int, begin: Path, lr: float) -> list[str]:
        """Of ``fewstep distill``, as far as they are this cell's own."""
        told = [self.row.method]
        for option, updates in self.row.updates(passes, self.steps).items():
            told += [option, str(updates)]
        told += [*self.row.options, "--init", str(begin), "--student-steps", str(self.steps)]
        return [*told, "--seed", str(self.seed), "--lr", str(lr)]
