"""What a run's last checkpoint holds, for tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fewstep.train.checkpoint import FOLDER, done


def held(folder: Path) -> dict[str, Any]:
    """Every tensor of the last whole checkpoint, however many processes wrote it."""
    path = folder / FOLDER / f"{done(folder):08d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(of.size, dtype=of.properties.dtype)  # type: ignore[union-attr]
        for key, of in metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors
