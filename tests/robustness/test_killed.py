"""Commands killed at random moments; ``python tests/robustness/killed.py`` tries all commands."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(45)

KILLED = Path(__file__).with_name("killed.py")


@pytest.mark.parametrize("name", ["data", "synthesize", "distill"])
def test_a_rerun_ends_as_if_undisturbed_with_no_leftovers(name: str) -> None:
    seed = str(random.randrange(2**31))
    done = subprocess.run(
        [sys.executable, str(KILLED), name, "--moments", "2", "--seed", seed], capture_output=True, text=True
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr[-3000:]}"
    assert f"{name}: " in done.stdout and "each rerun ended as undisturbed" in done.stdout
