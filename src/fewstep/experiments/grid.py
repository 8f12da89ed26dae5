"""The rows of ``fewstep ablate``'s table, and their training steps at equal compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Cost = tuple[int, int]
"""Passes per sample of a training step: per student step, and besides. See :class:`Row`."""

SPLIT_SHARE = 0.3
"""Share of the compute that split fine-tuning takes."""

MATCH: Cost = (1, 15 + 6)
"""The rollout; five updates of the proxy; the student's step and its backward pass, guided teacher, proxy."""

FLASH: Cost = (1 + 3, 6 + 3 + 6 + 3 + 3)
"""The rollout, and the one with gradient for the heads; two updates of the proxy; three times features for
the heads; matching; features of the rollout with gradient; trajectory guidance."""

SPLIT: Cost = (1 + 2 * 3 - 2, 2 + 6 + 3 + 2 * (6 + 3 + 3))
"""The same, but with an update for each branch. For the early branch, whose step is the last one, the steps
before it have no backward pass."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: in the table.
        method: of ``fewstep distill``.
        options: of the method, as on the command line.
        cost: forward passes of a net per sample of a training step: per student step, and besides. A
            backward pass counts as two, a guided teacher as two.
        split: the same for a step of split fine-tuning, in a row that has it.
    """

    name: str
    method: str
    options: tuple[str, ...] = ()
    cost: Cost = (0, 3)
    split: Cost | None = None

    def updates(self, passes: int, steps: int) -> dict[str, int]:
        """Return the training steps that ``passes`` allow a student, by the option that sets them."""
        if self.split is None:
            return {"--steps": _training_steps(passes, self.cost, steps)}
        late = round(passes * SPLIT_SHARE)
        return {
            "--split-steps": _training_steps(late, self.split, steps),
            "--steps": _training_steps(passes - late, self.cost, steps),
        }


def _training_steps(passes: int, cost: Cost, steps: int) -> int:
    return max(1, round(passes / (cost[0] * steps + cost[1])))


FEW = ("--warm-start-steps", "0", "--proxy-updates", "2")

ROWS = (
    Row("trajectory", "trajectory"),
    Row("DMD2", "dmd", ("--score-point", "renoise", "--proxy-target", "estimates"), MATCH),
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
    Row("DMD2 + SenseFlow's IDA", "dmd", ("--proxy-target", "estimates", "--ida-decay", "0.98"), MATCH),
    Row("TDM", "tdm", (), MATCH),
    Row("LADD", "ladd", (), (0, 2 * 4 + 6)),
    Row("LCM", "lcm", (), (0, 6)),
    Row("flash", "flash", (*FEW, "--split-steps", "0"), FLASH),
    Row("flash, split and merged", "flash", FEW, FLASH, SPLIT),
)


@dataclass(frozen=True)
class Cell:
    """One training: a row at a number of student steps, with a seed."""

    row: Row
    steps: int
    seed: int

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.row.name.lower())
        return f"{'-'.join(filter(None, words.split('-')))}.{self.steps}.{self.seed}"

    def arguments(self, passes: int, init: Path, lr: float) -> list[str]:
        """Return the arguments of ``fewstep distill`` that belong to this cell alone."""
        arguments = [self.row.method]
        for option, updates in self.row.updates(passes, self.steps).items():
            arguments += [option, str(updates)]
        arguments += [*self.row.options, "--init", str(init), "--student-steps", str(self.steps)]
        return [*arguments, "--seed", str(self.seed), "--lr", str(lr)]
