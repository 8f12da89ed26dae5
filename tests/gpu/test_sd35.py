"""``gpu/sd35.py`` on a CPU with narrow parts writes every row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(10)

SCRIPT = Path(__file__).parents[2] / "gpu" / "sd35.py"


def test_tiny_shapes_write_all_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--sizes", "32", "--times", "1"]
    environment = os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "sd35.jsonl").read_text().splitlines()]
    baseline = [row for row in rows if row["who"] == "diffusers"]
    ours = [
        row for row in rows if row["who"] == "fewstep" and row.get("bits") in (16, 32) and "seconds" in row
    ]
    assert [row["t5"] for row in baseline] == [False, True] and all(row["seconds"] > 0 for row in baseline), (
        rows
    )
    assert {row["t5"] for row in ours} == {False, True}, rows
    assert any(row.get("planned_gib") for row in ours), rows
