"""Tables: what a spread, a paired difference and a line say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fewstep.core.types import UserError
from fewstep.experiments.fashion import report, rows
from fewstep.experiments.fashion.run import with_neighbour


def record(row: str, replicate: int, *frechet: float, choice: bool = False) -> dict[str, Any]:
    curve = [
        {"update": 100 * (i + 1), "images": 10, "figures": {"frechet": {"value": value}}}
        for i, value in enumerate(frechet)
    ]
    made_of = {"row": row, "student_steps": 4, "replicate": replicate, "choice": choice, "rate": 1e-4}
    return {"made_of": made_of, "curve": curve}


def test_students_interval_over_three_values() -> None:
    """By hand: mean 2, deviation 1, t(2) = 4.303, so 2 ± 2.484."""
    spread = report.Spread.of([1, 2, 3])
    assert spread.mean == 2 and spread.deviation == 1
    assert spread.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert spread.text(1) == "2.0 ± 1.0"


def test_one_replicate_has_no_interval() -> None:
    assert math.isinf(report.Spread.of([5.0]).half_width)
    assert report.Spread.of([5.0]).text(1) == "5.0"


def test_a_difference_is_taken_within_replicates() -> None:
    """Warm starts differ by 10, the methods by 1: the paired interval does not see the 10."""
    one = {i: record("a", i, 10.0 * i) for i in range(3)}
    other = {i: record("b", i, 10.0 * i + 1) for i in range(3)}
    difference = report.paired(one, other, "frechet")
    assert difference is not None
    assert (difference.mean, difference.half_width) == (-1.0, 0.0)
    assert report.paired(one, {7: record("b", 7, 1.0)}, "frechet") is None


def test_cells_of_a_choice_are_in_no_table() -> None:
    records = [record("a", 0, 9.0, 5.0), record("a", 1, 8.0, 4.0), record("a", 9, 1.0, choice=True)]
    line = report.table(records, ["a", "missing"], 4, "b").splitlines()[-1]
    assert "| a | 0.0001 | 200 | 2 |" in line and "4.5 ± 0.7" in line
    assert "8.5 ± 0.7" in report.table(records, ["a"], 4, "b", update=100)
    assert "| a | 8.5 ± 0.7 | 4.5 ± 0.7 |" in report.curves(records, ["a"], 4)


def test_rows_have_names_of_their_own() -> None:
    every = [*rows.PRIMARY, *rows.factorial()]
    assert len({row.slug for row in every}) == len(every)
    assert set(rows.MAIN) <= {row.name for row in rows.PRIMARY}
    assert len(rows.factorial()) == 72


def test_a_row_of_ones_own() -> None:
    row = rows.own_row("mine=my_package.mine --weight 2 --name 'a b'")
    assert row == rows.Row("mine", ("my_package.mine", "--weight", "2", "--name", "a b"))
    for text in ("mine", "=dmd", "mine="):
        with pytest.raises(UserError, match="NAME=METHOD"):
            rows.own_row(text)
    with pytest.raises(UserError, match="there is none"):
        rows.select(rows.PRIMARY, ("DMD3",))


def test_a_best_rate_at_an_end_brings_its_neighbour() -> None:
    """Rates go 1, 3, 10, 30, and a best one in the middle ends the search."""
    assert with_neighbour((3e-5, 1e-4, 3e-4), 1e-4) == (3e-5, 1e-4, 3e-4)
    assert with_neighbour((3e-5, 1e-4, 3e-4), 3e-4) == (3e-5, 1e-4, 3e-4, 1e-3)
    assert with_neighbour((3e-5, 1e-4, 3e-4), 3e-5) == (1e-5, 3e-5, 1e-4, 3e-4)
    assert with_neighbour((3e-6, 1e-5), 3e-6) == (1e-6, 3e-6, 1e-5)
