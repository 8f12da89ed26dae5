"""The diffusers baseline: the unmodified eager pipeline of diffusers, from fewstep's noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.bench.engines import EngineInfo, Spec
from fewstep.bench.timer import StageTimer
from fewstep.core.sampling import batch_noise


class DiffusersEngine:
    """``StableDiffusion3Pipeline`` as its documentation uses it."""

    def __init__(self, spec: Spec) -> None:
        import torch
        from diffusers import StableDiffusion3Pipeline

        from fewstep.families import sd3
        from fewstep.families.diffusers_io import has_part, read_facts
        from fewstep.inference.load import device_of

        folder, options = Path(spec.model), spec.options
        if spec.threads:
            torch.set_num_threads(spec.threads)
        sd3.ARCHITECTURE.read_index(folder)  # diffusers imports any library that it names
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not has_part(folder, name)}
        self.dtype = getattr(torch, spec.dtype)
        self.pipe: Any = StableDiffusion3Pipeline.from_pretrained(
            spec.model, torch_dtype=self.dtype, use_safetensors=True, **absent
        )
        self.device = device_of(options.get("device", "auto")) if options else "cpu"
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        facts = read_facts(folder)
        self.steps: int = spec.steps or facts.get("steps") or 28
        self.guidance = facts.get("guidance")
        self.t5 = not absent
        side = str(self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor)
        sides = [int(pixels) for pixels in (options.get("size") or side).lower().split("x")]
        self.width, self.height = sides[0], sides[-1]
        self.dtype_name = spec.dtype

    @property
    def info(self) -> EngineInfo:
        bits = 32 if self.dtype_name == "float32" else 16
        engine = f"diffusers eager {self.dtype_name}"
        return EngineInfo(engine, bits, self.steps, self.guidance, (self.width, self.height))

    def generate(self, prompt: str, seeds: Sequence[int], timer: StageTimer) -> np.ndarray:
        import torch

        sides = (side // self.pipe.vae_scale_factor for side in (self.height, self.width))
        noise = batch_noise(seeds, (self.pipe.transformer.config.in_channels, *sides))
        lengths: dict[str, Any] = {} if self.t5 else {"max_sequence_length": 0}
        with (
            _timed(self.pipe, "encode_prompt", "text", timer),
            _timed(self.pipe.transformer, "forward", "steps", timer),
            _timed(self.pipe.vae, "decode", "decode", timer),
        ):
            images = self.pipe(
                [prompt] * len(seeds),
                sigmas=np.linspace(1, 1 / self.steps, self.steps).tolist(),  # the scheduler shifts them
                num_inference_steps=self.steps,
                guidance_scale=self.guidance or 1.0,
                latents=torch.from_numpy(noise).to(self.device, self.dtype),
                height=self.height,
                width=self.width,
                **lengths,
            ).images
        return np.stack([np.asarray(image) for image in images])


class _timed:
    """Within the block, add the time of a method to a stage."""

    def __init__(self, owner: object, name: str, stage: str, timer: StageTimer) -> None:
        self.owner, self.name, self.stage, self.timer = owner, name, stage, timer

    def __enter__(self) -> None:
        method = getattr(self.owner, self.name)

        def timed(*args: object, **kwargs: object) -> object:
            return self.timer(self.stage, lambda: method(*args, **kwargs))

        setattr(self.owner, self.name, timed)

    def __exit__(self, *error: object) -> None:
        delattr(self.owner, self.name)


def load(spec: Spec) -> DiffusersEngine:
    """Load a diffusers folder of SD3's kind.

    Raises:
        UserError: the folder is no such pipeline.
    """
    return DiffusersEngine(spec)
