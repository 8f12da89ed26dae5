"""Benchmark engines: each module loads a model in one library and generates with it.

An engine is a module with a function ``load(spec: Spec) -> Engine``. It is named by its module here, by the
import path of a module or function (``my.module``, ``my.module:load``), or by an entry point of the group
``fewstep.bench_engine``. Its own process imports it (:mod:`fewstep.bench.worker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from fewstep.bench.timer import StageTimer
from fewstep.core import plugins
from fewstep.core.types import UserError

FEWSTEP, DIFFUSERS, GENAI = "fewstep", "diffusers", "genai"
"""Names of the engines here."""


@dataclass(frozen=True)
class Spec:
    """One engine at one setting.

    Attributes:
        model: as ``fewstep generate --model`` takes it; for a baseline the folder of its model.
        steps: sampling steps; ``None`` takes the model's own.
        batch: images in one batch.
        engine: the engine's name or import path.
        threads: processor threads; 0 takes the engine's default.
        dtype: floating-point type of the diffusers baseline, ``float32`` or ``bfloat16``.
        options: how a PyTorch model runs (fields of :class:`fewstep.inference.options.TorchOptions`); float32
            on the CPU by default.
    """

    model: str
    steps: int | None
    batch: int
    engine: str = FEWSTEP
    threads: int = 0
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class EngineInfo:
    """Description of the model that an engine runs.

    Attributes:
        engine: the engine's name in records.
        bits: of a stored weight; ``None`` if unknown.
        steps: sampling steps.
        guidance: guidance scale; ``None`` without guidance.
        size: width and height of the images in pixels.
    """

    engine: str
    bits: int | None
    steps: int
    guidance: float | None
    size: tuple[int, int]


class Engine(Protocol):
    """A loaded model."""

    @property
    def info(self) -> EngineInfo:
        """Description of the model."""
        ...

    def generate(self, prompt: str, seeds: Sequence[int], timer: StageTimer) -> np.ndarray:
        """Generate one batch from the noise of the seeds, and time its stages.

        Args:
            prompt: of all images.
            seeds: one per image; image ``i`` starts from ``fewstep.core.sampling.noise(seeds[i], shape)``.
            timer: times the stages ``text``, ``modulation``, ``steps`` and ``decode``, as far as there are
                any. An engine that measures its stages itself writes to ``timer.seconds``.

        Returns:
            uint8 ``[B, h, w, 3]``.
        """
        ...


def find(name: str) -> Callable[[Spec], Engine]:
    """Return the function that loads the engine of this name or import path.

    Raises:
        UserError: there is no such engine.
    """
    found = plugins.load(name, __name__, "bench_engine")
    load: Any = getattr(found, "load", None) if isinstance(found, ModuleType) else found
    if not callable(load):
        raise UserError(f"the bench engine {name} has no function load")
    return cast("Callable[[Spec], Engine]", load)
