"""The end of split fine-tuning: two branches become one net, at the ratio that scores best."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fewstep.core import atomic
from fewstep.distill.context import DistillContext
from fewstep.distill.validation import KidToTeacher
from fewstep.modules.timestep_experts import merge

RATIOS = tuple(i / 10 for i in range(11))
"""Shares of the late branch that are tried. The paper's is 3 : 7."""


def merge_and_save(one: DistillContext) -> Callable[[Mapping[str, Any]], None]:
    """What writes the merged student into the run's folder, and ``merge.json``: the score of every ratio."""

    def finish(nets: Mapping[str, Any]) -> None:
        early, late = (one.weights(name, nets) for name in ("early", "late"))
        score, net = KidToTeacher(one), one.new_net().to(one.teacher.net.device)
        adapter: Any = one.teacher.velocity
        curve: dict[float, float] = {}
        for ratio in RATIOS:
            net.load_state_dict(merge(early, late, ratio))
            curve[ratio] = score(replace(adapter, net=net))
        best = min(curve, key=lambda ratio: curve[ratio])
        one.write(merge(early, late, best))
        told = {"metric": score.metric, "late": best, "curve": [[r, s] for r, s in curve.items()]}
        atomic.write(one.folder / "merge.json", (json.dumps(told, indent=1) + "\n").encode())

    return finish
