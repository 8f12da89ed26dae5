"""Command-line options that Pocket's training recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

OutputFolder = Annotated[Path, Parameter(name=["--output", "-o"])]
"""The option that names the run folder."""


@Parameter(name="*")
@dataclass(frozen=True)
class ComputeOptions:
    """Time limit, seed and hardware of a training run.

    Attributes:
        max_minutes: Do as many steps as fit into so many minutes, at most --steps; 0 does --steps.
        seed: Of the weights, the data order and all noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """

    max_minutes: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int = 0


DEFAULT_COMPUTE = ComputeOptions()
