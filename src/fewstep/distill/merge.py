"""Merge the two branches of split-timestep fine-tuning, at the ratio that scores best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewstep.core import atomic
from fewstep.distill.context import DistillContext
from fewstep.distill.validation import KidToTeacher
from fewstep.distill.writing import write_weights
from fewstep.modules.timestep_experts import merge

if TYPE_CHECKING:
    from torch.nn import Module

RATIOS = tuple(i / 10 for i in range(11))
"""Shares of the late branch that are tried. The paper's is 3 : 7."""


def merge_and_write(context: DistillContext, nets: Mapping[str, Module]) -> None:
    """Write the merged student into the run's folder, and ``merge.json`` with the score of every ratio."""
    early, late = (context.weights(name, nets) for name in ("early", "late"))
    score, net = KidToTeacher(context), context.new_net().to(context.teacher.net.device)
    adapter: Any = context.teacher.velocity  # a dataclass of its family, with the field ``net``
    curve: dict[float, float] = {}
    for ratio in RATIOS:
        net.load_state_dict(merge(early, late, ratio))
        curve[ratio] = score(replace(adapter, net=net))
    best = min(curve, key=lambda ratio: curve[ratio])
    write_weights(context, merge(early, late, best))
    record = {"metric": score.metric, "late": best, "curve": [[r, s] for r, s in curve.items()]}
    atomic.write(context.folder / "merge.json", (json.dumps(record, indent=1) + "\n").encode())
