"""OpenVINO GenAI's own pipeline, on a folder of ``fewstep export --to genai``, from fewstep's noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.bench.engines import EngineInfo, Spec
from fewstep.bench.timer import StageTimer
from fewstep.core.cpu import cores
from fewstep.core.sampling import batch_noise
from fewstep.core.types import UserError
from fewstep.families.diffusers_io import read_json
from fewstep.runtime.openvino import openvino, properties  # before GenAI: it switches telemetry off

if TYPE_CHECKING:
    from openvino_genai import Generator


class GenAI:
    """``Text2ImagePipeline`` with the arithmetic of fewstep's OpenVINO bundles and no caching of steps."""

    def __init__(self, spec: Spec) -> None:
        import openvino_genai

        self.facts = read_json(Path(spec.model) / "fewstep.json")
        steps = self.facts["steps"]
        if spec.steps not in (None, steps):  # its scheduler is made for them (fewstep.export.genai)
            raise UserError(f"it is for {steps} steps: export another with --steps {spec.steps}")
        self.pipe: Any = openvino_genai.Text2ImagePipeline(
            spec.model, "CPU", **properties(spec.threads or cores())
        )
        config: Any = self.pipe.get_generation_config()
        config.taylorseer_config = None  # by default it extrapolates some of many steps
        config.num_inference_steps = steps
        config.guidance_scale = self.facts["guidance"] or 1.0
        self.pipe.set_generation_config(config)

    @property
    def info(self) -> EngineInfo:
        facts, latent = self.facts, self.facts["latent"]
        size = latent["downscale"] * latent["width"], latent["downscale"] * latent["height"]
        return EngineInfo("OpenVINO GenAI", facts["about"]["bits"], facts["steps"], facts["guidance"], size)

    def generate(self, prompt: str, seeds: Sequence[int], timer: StageTimer) -> np.ndarray:
        latent = self.facts["latent"]
        shape = latent["channels"], latent["height"], latent["width"]
        images = self.pipe.generate(
            prompt, num_images_per_prompt=len(seeds), generator=_generator(batch_noise(seeds, shape))
        )
        metrics = self.pipe.get_performance_metrics()
        timer.seconds["text"] = sum(metrics.get_text_encoder_infer_duration().values()) / 1e3
        timer.seconds["steps"] = sum(metrics.raw_metrics.iteration_durations) / 1e6
        timer.seconds["decode"] = metrics.get_vae_decoder_infer_duration() / 1e3
        return np.array(images.data)


def _generator(noise: np.ndarray) -> Generator:
    """Return a generator of GenAI's that gives ``noise [B, C, H, W]``."""
    from openvino_genai import Generator

    class FixedNoise(Generator):
        def randn_tensor(self, shape: object) -> openvino.Tensor:
            return openvino.Tensor(noise)

    return FixedNoise()


def load(spec: Spec) -> GenAI:
    """Load a folder of ``fewstep export --to genai``.

    Raises:
        UserError: it is for another number of steps.
    """
    return GenAI(spec)
