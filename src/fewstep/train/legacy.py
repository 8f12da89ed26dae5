"""Checkpoints of fewstep 0.1.0, one file: read, no longer written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.train.parallel import world
from fewstep.types import UserError

LAST = "last.pt"
PREFIX = "module."


def restore(folder: Path, held: Mapping[str, Any]) -> int:
    """Load ``folder/last.pt`` into ``held`` where it is there; tells the step to go on from.

    Raises:
        UserError: it is broken or of other nets, or several processes are to read it.
    """
    import torch

    path = folder / LAST
    if not path.exists():
        return 0
    if world().size > 1:
        raise UserError(
            f"{path} is of an earlier version: resume once with one process, which writes it anew"
        )
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        for name, net in held["nets"].items():
            net.load_state_dict(read["nets"][name])
            held["optimizers"][name].load_state_dict(read["optimizers"][name])
        for name, average in held["averages"].items():
            kept = read["averages"][name]
            average.count = int(kept["n_averaged"])
            for key, value in average.values.items():
                value.copy_(kept[PREFIX + key])
        return int(read["step"])
    except Exception as error:  # a damaged pickle can raise anything
        what = (str(error).splitlines() or [""])[0][:120]
        raise UserError(
            f"{path} cannot be resumed ({type(error).__name__} {what}); move it away to start anew"
        ) from error
