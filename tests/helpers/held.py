"""What a run's last checkpoint holds, for tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fewstep.train.checkpoint import FOLDER, last_step
from fewstep.train.checkpoint_storage import Reader


def held(folder: Path) -> dict[str, Any]:
    """Every tensor of the last whole checkpoint, however many processes wrote it."""
    path = folder / FOLDER / f"{last_step(folder):08d}"
    reader = Reader(path)
    tensors: dict[str, Any] = {
        key: torch.empty(of.size, dtype=getattr(torch, of.dtype)) for key, of in reader.index.tensors.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
