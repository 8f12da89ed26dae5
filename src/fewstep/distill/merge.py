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
    from torch import Tensor
    from torch.nn import Module

RATIOS = tuple(i / 10 for i in range(11))
"""Shares of the late branch that are tried. The paper's is 3 : 7."""


def merge_and_write(
    context: DistillContext, nets: Mapping[str, Module], *, ratio: float | None = None
) -> None:
    """Write the merged student into the run's folder, and ``merge.json`` with the score of every ratio.

    The branches are written to ``branches/``, so that other ratios can be made later.

    Args:
        context: the distillation.
        nets: the branches ``early`` and ``late``.
        ratio: share of the late branch; ``None`` takes the one of :data:`RATIOS` that scores best.
    """
    early, late = (context.weights(name, nets) for name in ("early", "late"))
    _write_branches(context, {"early": early, "late": late})
    curve: dict[float, float] = {}
    metric = ""
    if ratio is None:
        score, net = KidToTeacher(context), context.new_net().to(context.teacher.net.device)
        metric = score.metric
        adapter: Any = context.teacher.velocity  # a dataclass of its family, with the field ``net``
        for each in RATIOS:
            net.load_state_dict(merge(early, late, each))
            curve[each] = score(replace(adapter, net=net))
        ratio = min(curve, key=lambda each: curve[each])
    write_weights(context, merge(early, late, ratio))
    record = {"metric": metric, "late": ratio, "curve": [[r, s] for r, s in curve.items()]}
    atomic.write(context.folder / "merge.json", (json.dumps(record, indent=1) + "\n").encode())


def _write_branches(context: DistillContext, branches: Mapping[str, Mapping[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    with atomic.replacing_folder(context.folder / "branches") as fresh:
        for name, weights in branches.items():
            tensors = {key: tensor.contiguous().cpu() for key, tensor in weights.items()}
            save_file(tensors, fresh / f"{name}.safetensors")
