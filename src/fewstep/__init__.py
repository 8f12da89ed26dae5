"""fewstep: few-step rectified-flow image generation, from teacher to user.

    import fewstep

    pipe = fewstep.load()
    pictures = pipe("a red apple, 3D style", seed=0, n=4)   # Pillow images
    fewstep.save(pictures[0], "apple.png")                  # with their records

Importing this package imports nothing heavy; generation with a bundle never imports PyTorch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from fewstep.picture import save
    from fewstep.pipeline import Pipeline
    from fewstep.source import load
    from fewstep.types import UserError

__version__ = "0.1.0"
__all__ = ["Pipeline", "UserError", "__version__", "load", "save"]

_HOMES = {
    "Pipeline": "fewstep.pipeline",
    "UserError": "fewstep.types",
    "load": "fewstep.source",
    "save": "fewstep.picture",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
