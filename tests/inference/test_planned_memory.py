"""Planned peaks: against this process's own memory, and of SD3.5 Medium by its shapes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.core.types import UserError
from fewstep.inference import memory_plan
from fewstep.inference.memory_model import MemoryCosts, StagePeaks
from fewstep.inference.memory_plan import ExecutionConfig, PlanConstraints, choose
from fewstep.pocket.config import byte_tokenizer

pytestmark = pytest.mark.slow(10)

WORKER = Path(__file__).parents[1] / "helpers/drawn_within.py"
ONE = PlanConstraints(
    gpu=False, native=32, bits=(32, 8), text_bits=(32, 8), batch=4, rows=1, steps=4, latents=(8, 8)
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_planned_peaks_are_those_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path / "m")]
    for _ in ("make", "draw"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    drawn = [row for row in rows if "planned" in row]
    assert len(drawn) >= 4, rows
    ways = {(row["bits"], row["text_bits"], row["residency"]) for row in drawn}
    assert len(ways) >= (3 if importlib.util.find_spec("torchao") else 2), rows
    for row in drawn:
        assert abs(row["planned"] / row["measured"] - 1) < 0.1, rows


def counted(weights: dict[str, int], steps: int = 10) -> Callable[[ExecutionConfig], dict[str, int]]:
    """Stages of parts that weigh so much in 32 bits."""

    def size(part: str, bits: int) -> int:
        return weights[part] * bits // 32

    sizes = MemoryCosts(
        weights=size,
        layer=lambda bits: 1,
        reading=size,
        encoding=lambda part, bits: 1,
        stepping=lambda bits, batch: steps * batch,
        decoding=lambda tiles, batch: 40 // tiles**2,
        image_encoding=lambda tiles: 0,
    )
    return lambda choice: StagePeaks(ONE, sizes, ["text_encoder"], "text_encoder", "vae", choice).stages()


WEIGHTS = {"text_encoder": 800, "transformer": 400, "modulation": 200, "vae": 40}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (2000, ExecutionConfig(32, 32, 1, "all", 4)),
        (1400, ExecutionConfig(32, 32, 1, "encoders", 4)),
        (1250, ExecutionConfig(32, 32, 1, "net", 4)),
        (1000, ExecutionConfig(32, 32, 1, "codec", 4)),
        (830, ExecutionConfig(32, 32, 1, "none", 4)),
        (500, ExecutionConfig(32, 8, 1, "codec", 4)),
        (420, ExecutionConfig(32, 8, 1, "none", 2)),
        (230, ExecutionConfig(8, 8, 1, "none", 4)),
    ],
)
def test_what_loses_least_is_chosen_first(limit: int, expected: ExecutionConfig) -> None:
    made = choose(ONE, counted(WEIGHTS), limit, 0)
    assert made.config == expected and memory_plan.required_bytes(made) <= limit


def test_an_impossible_memory_tells_one_that_works() -> None:
    with pytest.raises(UserError, match="the least that works here is 1MiB") as caught:
        choose(ONE, counted(WEIGHTS), 100, 0)
    assert "\n" not in str(caught.value)


def test_sd35_medium_fits_cards_by_what_is_counted_of_it() -> None:
    """By shapes alone; the bytes of weights are those that the real model's files have at 16 bits."""
    from dataclasses import replace

    from diffusers import FlowMatchEulerDiscreteScheduler

    from fewstep.families import sd3
    from fewstep.families.presets import SD35_MEDIUM
    from fewstep.inference.memory_profile import MemoryProfiler

    tokens = {f"tokenizer{which}": byte_tokenizer(77) for which in ("", "_2", "_3")}
    others = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **tokens}
    outline = replace(SD35_MEDIUM, others=others)
    family = sd3.assemble(outline.stand_ins(), name="m", steps=4, guidance=None)
    bits = (16, 8, 4)
    asked = PlanConstraints(True, 16, bits, bits, batch=1, rows=1, steps=4, latents=(128, 128))
    rehearsal = MemoryProfiler(outline, family, asked)
    held = {
        part: rehearsal.weight_memory.weights(part, 16)
        for part in ("transformer", "modulation", "text_encoder_3")
    }
    assert held["modulation"] == pytest.approx(1.53e9, rel=0.02)
    assert held["transformer"] == pytest.approx(2.95e9, rel=0.02)
    assert held["text_encoder_3"] == pytest.approx(9.52e9, rel=0.01)
    made = {
        gib: choose(asked, rehearsal.stages, gib * 2**30, memory_plan.CONTEXT)
        for gib in (4, 6, 8, 12, 16, 24)
    }
    assert made[24].config.residency == "all" and made[24].config.bits == 16
    assert made[12].config.bits == 16 and made[12].config.text_bits == 16
    for gib, chosen in made.items():
        assert memory_plan.required_bytes(chosen) <= gib * 2**30
    # An H200's allocator said 1.75 and 1.25 of decoding (docs/torch.md).
    quick = MemoryProfiler(outline, family, replace(asked, compile=True))
    said = [rehearsal.decoding(1, 1), quick.decoding(1, 1)]
    assert [size / 2**30 for size in said] == pytest.approx([1.75, 1.25], rel=0.03)
