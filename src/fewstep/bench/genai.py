"""OpenVINO GenAI's own pipeline, on a folder that ``fewstep export --to genai`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.sampling import batch_noise
from fewstep.core.types import UserError
from fewstep.runtime.openvino import openvino, properties  # before GenAI, which would tell of itself

if TYPE_CHECKING:
    from fewstep.bench.worker import StageTimer


class GenAI:
    """It computes as our OpenVINO bundles do, and caches nothing from step to step; of ours is the noise of
    the seed."""

    def __init__(self, model: str, steps: int | None, threads: int) -> None:
        import openvino_genai

        from fewstep.core.cpu import cores
        from fewstep.families.diffusers_io import read_json

        self.told = read_json(Path(model) / "fewstep.json")
        if steps not in (None, self.told["steps"]):  # its scheduler is made for them (fewstep.export.genai)
            raise UserError(f"it is for {self.told['steps']} steps: export another with --steps {steps}")
        self.pipe: Any = openvino_genai.Text2ImagePipeline(model, "CPU", **properties(threads or cores()))
        config: Any = self.pipe.get_generation_config()
        config.taylorseer_config = None  # by default some steps of many are guessed from those before
        config.num_inference_steps = self.told["steps"]
        config.guidance_scale = self.told["guidance"] or 1.0
        self.pipe.set_generation_config(config)

    @property
    def about(self) -> dict[str, Any]:
        latent = self.told["latent"]
        size = [latent["downscale"] * latent[side] for side in ("width", "height")]
        told = {"steps": self.told["steps"], "guidance": self.told["guidance"], "size": size}
        return {"engine": "OpenVINO GenAI", "bits": self.told["about"]["bits"], **told}

    def __call__(self, prompts: Sequence[str], seed: int, stages: StageTimer) -> Any:
        if len(set(prompts)) > 1:
            raise UserError("OpenVINO GenAI draws pictures of one prompt at once")
        latent = self.told["latent"]
        shape = latent["channels"], latent["height"], latent["width"]
        made = self.pipe.generate(
            prompts[0],
            num_images_per_prompt=len(prompts),
            generator=_given(batch_noise(range(seed, seed + len(prompts)), shape)),
        )
        took = self.pipe.get_performance_metrics()
        stages.seconds["text"] = sum(took.get_text_encoder_infer_duration().values()) / 1e3
        stages.seconds["steps"] = sum(took.raw_metrics.iteration_durations) / 1e6
        stages.seconds["decode"] = took.get_vae_decoder_infer_duration() / 1e3
        return np.array(made.data)


def _given(noise: np.ndarray) -> Any:
    """A generator of GenAI's that gives ``noise [B, C, H, W]``."""
    from openvino_genai import Generator

    class Given(Generator):
        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(noise)

    return Given()
