"""fewstep itself: a bundle on its engine, or a PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from fewstep.bench.engines import EngineInfo, Spec
from fewstep.bench.timer import StageTimer
from fewstep.core.types import PrefetchingTextEncoder
from fewstep.pipeline.loading import load as load_pipeline
from fewstep.pipeline.params import STRENGTH, Request


class FewstepEngine:
    """The pipeline of :mod:`fewstep.pipeline`, stage by stage."""

    def __init__(self, spec: Spec) -> None:
        self.pipe = load_pipeline(spec.model, threads=spec.threads or None, **spec.options)
        self.compiled = bool(spec.options.get("compile"))
        self.model = self.pipe.model
        self.steps = spec.steps or self.model.steps

    @property
    def info(self) -> EngineInfo:
        bundle = self.pipe.bundle
        bits = (
            cast("int | None", bundle.about.get("bits"))
            if bundle
            else self.pipe.record_fields.get("bits") or 32
        )
        runtime = bundle.engine if bundle else "torch"
        if bundle and bundle.compute != "float32":
            runtime += f" {bundle.compute}"
        if self.compiled:
            runtime += " compiled"
        return EngineInfo(f"fewstep {runtime}", bits, self.steps, self.model.guidance, self.pipe.size)

    def generate(self, prompt: str, seeds: Sequence[int], timer: StageTimer) -> np.ndarray:
        if isinstance(self.model.text, PrefetchingTextEncoder):
            self.model.text.clear_cache()  # every round encodes the prompt anew
        guidance = self.model.guidance
        request = Request(
            jobs=tuple((prompt, seed) for seed in seeds),
            steps=self.steps,
            guidance=self.model.embedded_guidance if guidance is None else guidance,
            negative=None,
            image=None,
            strength=STRENGTH,
        )
        (images,) = self.pipe.run(request, batch=len(seeds), stage=timer)
        return np.stack([np.asarray(image) for image in images])


def load(spec: Spec) -> FewstepEngine:
    """Load a model as ``fewstep generate`` does."""
    return FewstepEngine(spec)
