"""Distribution matching on the ring of eight modes, along a thousand updates, as a table.

    PYTHONPATH=tests/helpers python tests/helpers/ring_table.py --json docs/results/ring.json

The teacher is the closed-form mixture, so its scores are exact. Students are MLPs of four steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fewstep.core import schedule
from fewstep.methods.dmd import DistributionMatching, GradientOn
from fewstep.methods.flash import Flash
from fewstep.methods.flow_matching import FlowMatching
from fewstep.methods.tdm import TDM
from fewstep.methods.trajectory import Trajectory
from mixture import ring
from points import GRID, Quality, critic, kept, net, quality, walked

SETTINGS: tuple[tuple[str, str, str, GradientOn | None, float, float], ...] = (
    # name, score point, proxy target, gradient on, anchor, weight of the heads
    ("renoised, finals", "renoise", "finals", None, 0.0, 0.0),
    ("renoised, estimates", "renoise", "estimates", None, 0.0, 0.0),
    ("shared, finals", "shared", "finals", None, 0.0, 0.0),
    ("shared, path", "shared", "path", None, 0.0, 0.0),
    ("shared, path, equal weights", "shared", "path", "velocity", 0.0, 0.0),
    ("shared freely, path", "shared-free", "path", None, 0.0, 0.0),
    ("shared, path, heads", "shared", "path", None, 0.0, 0.1),
    ("shared, path, heads, anchor", "shared", "path", None, 1.0, 0.1),
    ("renoised, finals, heads, anchor", "renoise", "finals", None, 1.0, 0.1),
)
RATE, RATES = 2e-4, {"proxy": 1e-3, "heads": 1e-3}
BATCH = 256
CURVE = (100, 200, 500)


def students(method: Any, updates: int, seed: int, lr: float = RATE) -> dict[int, Any]:
    """Return the EMA students along a training, by update."""
    with tempfile.TemporaryDirectory() as folder:
        return kept(Path(folder), method, DATA(BATCH), updates, lr, RATES, seed, every=100)


def methods(student: Any, flow: Any) -> dict[str, Any]:
    """Return every method with nets of its own."""
    made: dict[str, Any] = {}
    for name, point, target, on, anchor, weight in SETTINGS:
        one, proxy = copy.deepcopy(student), copy.deepcopy(flow)
        matching = DistributionMatching(ring(), proxy, point, target, gradient_on=on)  # type: ignore[arg-type]
        made[name] = Flash(
            one, one, proxy, matching, critic(proxy, weight=weight), GRID, trajectory_weight=anchor
        )
    one, proxy = copy.deepcopy(student), copy.deepcopy(flow)
    return made | {"TDM": TDM(one, one, proxy, proxy, ring(), GRID)}


DATA = walked(65_536)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append")
    parser.add_argument("--json", type=Path, help="its figures of other settings are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warm, proxy_start = net(), net(5)
    with tempfile.TemporaryDirectory() as folder:
        student = kept(Path(folder), Trajectory(warm, warm, GRID), DATA(512), 2500, 4e-3)[2500]
    with tempfile.TemporaryDirectory() as folder:
        method = FlowMatching(proxy_start, proxy_start, schedule.uniform)
        flow = kept(Path(folder), method, DATA(512), 1200, 3e-3)[1200]
    points = [*(point for point in CURVE if point < options.updates), options.updates]
    print("| | " + " | ".join(f"{point}: distance, off %" for point in points) + " |")
    print("|---|" + "---:|" * len(points))
    print(f"| warm start | {_cell([quality(student)])}" + " |" * len(points))
    figures: dict[str, Any] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    for name in options.only or methods(student, flow):
        runs: list[dict[int, Quality]] = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            own = students(methods(student, flow)[name], options.updates, seed)
            runs.append({point: quality(own[point]) for point in points})
        print(f"| {name} | " + " | ".join(_cell([run[p] for run in runs]) for p in points) + " |", flush=True)
        figures[name] = [{point: asdict(each) for point, each in run.items()} for run in runs]
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _cell(ends: list[Quality]) -> str:
    cells: list[str] = []
    for figure, scale, digits in (("distance", 1, 4), ("off", 100, 1)):
        values = [scale * getattr(end, figure) for end in ends]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}")
    return ", ".join(cells)


if __name__ == "__main__":
    main()
