"""Print matching's settings side by side on the ring of eight modes. ``python tests/helpers/ring_table.py``.

Two hundred updates are the beginning of a training: the figures do not rank methods.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fewstep.core import schedule
from fewstep.methods.dmd import DistributionMatching
from fewstep.methods.flash import Flash
from fewstep.methods.flow_matching import FlowMatching
from fewstep.methods.trajectory import Trajectory
from mixture import ring
from points import GRID, critic, net, quality, taught, walked

SETTINGS: tuple[tuple[str, str, str, float, float], ...] = (
    # name, where, proxied, anchor, adversarial weight
    ("shared", "shared", "finals", 0.0, 0.0),
    ("shared-free", "shared-free", "finals", 0.0, 0.0),
    ("renoise", "renoise", "finals", 0.0, 0.0),
    ("shared, proxy on the path", "shared", "path", 0.0, 0.0),
    ("renoise, proxy on estimates", "renoise", "estimates", 0.0, 0.0),
    ("shared + adversarial .1", "shared", "finals", 0.0, 0.1),
    ("shared + adversarial .1, anchor 1", "shared", "finals", 1.0, 0.1),
    ("renoise + adversarial .1, anchor 1", "renoise", "finals", 1.0, 0.1),
)
RATES = {"proxy": 1e-3, "heads": 1e-3}


def run(method: Any, steps: int, lr: float, rates: dict[str, float] | None = None, seed: int = 0) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return taught(Path(folder), method, DATA(512), steps, lr, rates, seed)


DATA = walked(65_536)

if __name__ == "__main__":
    student, flow = net(), net(5)
    student = run(Trajectory(student, student, GRID), 2500, 4e-3)["student"]
    flow = run(FlowMatching(flow, flow, schedule.uniform), 1200, 3e-3)["net"]
    began = quality(student)
    print("| | energy distance | off, % | worst weight, % |\n|---|---:|---:|---:|")
    print(f"| warm start | {began.distance:.4f} | {100 * began.off:.2f} | {100 * began.weight:.1f} |")
    for name, where, proxied, anchor, weight in SETTINGS:
        ends: list[Any] = []
        for seed in range(3):
            one, proxy = copy.deepcopy(student), copy.deepcopy(flow)
            matching = DistributionMatching(ring(), proxy, where, proxied)  # type: ignore[arg-type]
            method = Flash(one, one, proxy, matching, critic(proxy, weight=weight), GRID, 5, 1.0, anchor)
            ends.append(quality(run(method, 200, 2e-4, RATES, seed)["student"]))
        cells: list[str] = []
        for figure, scale, digits in (("distance", 1, 4), ("off", 100, 2), ("weight", 100, 1)):
            told = [scale * getattr(end, figure) for end in ends]
            cells.append(f"{mean(told):.{digits}f} ± {stdev(told):.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
