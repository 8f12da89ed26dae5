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

    from fewstep.core.types import UserError
    from fewstep.images.io import save
    from fewstep.pipeline.loading import load
    from fewstep.pipeline.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "UserError", "__version__", "load", "save"]

_HOMES = {
    "Pipeline": "fewstep.pipeline.pipeline",
    "UserError": "fewstep.core.types",
    "load": "fewstep.pipeline.loading",
    "save": "fewstep.images.io",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
