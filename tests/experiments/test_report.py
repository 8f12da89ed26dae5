"""The document of ``fewstep ablate``, from made-up results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.core.stats import jackknife
from fewstep.experiments import report
from fewstep.experiments.report import document

FACTS = {"compute": "9 passes", "machine": "a lathe", "jobs": "1", "command": "fewstep ablate --seeds 2"}


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def results(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    told = [{"label": label, "figures": figures} for label, figures in rows.items()]
    return {
        "rows": told,
        "teacher": "T@28",
        "seen": 4,
        "held_out": 4,
        "seeds": 2,
        "scenes": 12,
        "extractor": "x",
    }


def test_figures_are_means_and_standard_deviations_over_seeds(tmp_path: Path) -> None:
    runs = [("A", 4, tmp_path / "a.4.0"), ("A", 4, tmp_path / "a.4.1"), ("B", 2, tmp_path / "b.2.0")]
    for number, (_, _, folder) in enumerate(runs):
        folder.mkdir()
        note = {"seconds": 60.0 * (number + 1), "bytes": 1e8 * (number + 1), "cut": number == 2}
        (folder / "cost.json").write_text(json.dumps(note))
    for _, _, folder in runs[:2]:
        note = {"metric": "kid-t", "late": 0.5, "curve": [[0.0, 3.0], [0.5, 1.25], [1.0, 2.0]]}
        (folder / "merge.json").write_text(json.dumps(note))
    rows = {"T@28": {"seen_top5": figure(0.5, 0.4, 0.6), "scene": figure(0.25), "scene_two": figure(0.1)}}
    for value, (_, steps, folder) in zip((0.01, 0.03, 0.02), runs, strict=True):
        rows[f"{folder / 'model'}@{steps}"] = {"kid_teacher": figure(value, value / 2, 2 * value)}
    text = document(runs, results(rows), FACTS)
    assert "| teacher |  |  | 50 [40, 60] |  | 25 |  |  |  |" in text
    assert "| A | 20 ± 14 |  |  |  |  |  | 1.5 | 200 |" in text
    assert "| B | 20 [10, 40] |  |  |  |  |  | ≥ 3.0 | 300 |" in text
    assert "| teacher |  | 10 |  |  |  |  |" in text  # scenes by category
    assert "| late branch's share | 0 | 0.5 | 1 |" in text
    assert "| A, 4 steps, seed 1: kid-t | 3.00 | 1.25 | 2.00 |" in text
    assert text.index("## 4 steps") < text.index("## 2 steps") < text.index("fewstep ablate --seeds 2")


def test_a_difference_that_all_prompts_share_is_sharper_than_either_figure(tmp_path: Path) -> None:
    prompts = np.random.default_rng(0).standard_normal(40)
    rows: dict[str, dict[str, Any]] = {"T@28": {}}
    runs: list[tuple[str, int, Path]] = []
    for name, better in (("trajectory", 0.0), ("flash", 0.001), ("other", 0.0)):
        for seed in range(2):
            folder = tmp_path / f"{name}.4.{seed}"
            folder.mkdir()
            (folder / "cost.json").write_text(json.dumps({"seconds": 60.0, "bytes": 1e8}))
            runs.append((name, 4, folder))
            own = jackknife(0.002 - better + 1e-5 * seed, 0.002 - better + 1e-4 * prompts)
            rows[f"{folder / 'model'}@4"] = {"kid_teacher": asdict(own)}
    text = document(runs, results(rows), FACTS)
    assert "| trajectory | 2 ± " in text and "| flash | 1 ± " in text
    cells = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in text.splitlines() if "|" in line
    }
    assert cells["trajectory"] == ""
    value, low, high = (float(word.strip("[],")) for word in cells["flash"].split())
    assert low < value == -1.0 < high < -0.95  # the prompts' own spread is gone, the seeds' is not
    value, low, high = (float(word.strip("[],")) for word in cells["other"].split())
    assert low < value == 0 < high


def test_few_seeds_ask_for_more() -> None:
    """Student's t: of two degrees 4.303, of many 1.960; equal parts of two add to four (Welch)."""
    assert report._quantile([(3.0, 2)]) == pytest.approx(4.3027, abs=1e-3)
    assert report._quantile([(3.0, 10**9)]) == pytest.approx(1.96, abs=1e-3)
    assert report._quantile([(0.5, 2), (0.5, 2)]) == pytest.approx(2.7764, abs=1e-3)
    assert report._quantile([(0.0, 2)]) == pytest.approx(1.96, abs=1e-3)
