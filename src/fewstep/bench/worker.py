"""One engine in a process of its own: it draws when it is told to, and says what each stage took.

``python -m fewstep.bench.worker SPEC`` reads a line of JSON a picture from standard input and answers with
one. While another engine has its turn it waits for its next line, and takes no processor time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STAGES = ("text", "modulation", "steps", "decode")


@dataclass
class StageTimer:
    """Seconds of a picture's stages."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        """Do ``work`` and add its time to a stage's."""
        begun = time.perf_counter()
        made = work()
        synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        return made


def cuda() -> Any:
    """torch's CUDA where something here has used it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def synchronize() -> None:
    """Wait until a GPU has done what it was told: only then is a stage's time its own."""
    if used := cuda():
        used.synchronize()


class Engine(Protocol):
    """What draws ``len(prompts)`` pictures at once, of the seeds ``seed, seed + 1, ...``."""

    def __call__(self, prompts: Sequence[str], seed: int, stages: StageTimer) -> Any:
        """uint8 ``[B, h, w, 3]``."""
        ...

    @property
    def about(self) -> dict[str, Any]: ...


class FewstepEngine:
    """fewstep, whatever runs the model: a bundle, or torch."""

    def __init__(self, model: str, steps: int | None, threads: int, wish: Mapping[str, Any]) -> None:
        from fewstep.pipeline.loading import load

        self.pipe = load(model, threads=threads or None, **wish)
        self.compiled = bool(wish.get("compile"))
        self.model = self.pipe.model
        self.steps = steps or self.model.steps

    @property
    def about(self) -> dict[str, Any]:
        bundle = self.pipe.bundle
        bits = bundle.about.get("bits") if bundle else self.pipe.record_fields.get("bits") or 32
        runs = bundle.engine if bundle else "torch"
        if bundle and bundle.compute != "float32":
            runs += f" {bundle.compute}"
        if self.compiled:
            runs += " compiled"
        told = {"steps": self.steps, "guidance": self.model.guidance, "size": list(self.pipe.size)}
        return {"engine": f"fewstep {runs}", "bits": bits, **told}

    def __call__(self, prompts: Sequence[str], seed: int, stages: StageTimer) -> Any:
        import numpy as np

        from fewstep.core import sampling, schedule
        from fewstep.core.guidance import Guided
        from fewstep.images.io import to_uint8

        model: Any = self.model
        if hasattr(model.text, "forget"):  # who reads a prompt again and again remembers it
            model.text.forget()
        grid = schedule.grid(self.steps, model.shift)
        velocity = model.velocity
        seeds = range(seed, seed + len(prompts))
        x = model.lift(sampling.batch_noise(seeds, model.latent))
        cond = stages.of("text", lambda: model.text(prompts))
        if model.guidance not in (None, 1):
            null = stages.of("text", lambda: model.text([""] * len(prompts)))
            velocity = Guided(velocity, null, model.guidance)
        steps = stages.of("modulation", lambda: sampling.prepare_steps(velocity, grid[:-1], cond))
        move = sampling.step_rule(model.sampler, seeds, model.lift)

        def walk() -> Any:
            y = x
            for index, step in enumerate(steps):
                y = move(y, step(y), grid[index], grid[index + 1], index)
            return y

        x = stages.of("steps", walk)
        made = stages.of("decode", lambda: np.asarray(model.lower(to_uint8(model.codec.decode(x)))))
        return made.transpose(0, 2, 3, 1).astype(np.uint8)


class DiffusersEngine:
    """Stock diffusers' eager pipeline, as a person would use it; of ours only the noise of the seed."""

    def __init__(
        self, model: str, steps: int | None, threads: int, dtype: str, wish: Mapping[str, Any]
    ) -> None:
        import torch
        from diffusers import StableDiffusion3Pipeline

        from fewstep.families import sd3
        from fewstep.families.diffusers_io import has_part, read_facts
        from fewstep.inference.load import device_of

        if threads:
            torch.set_num_threads(threads)
        sd3.ARCHITECTURE.read_index(Path(model))  # diffusers imports any library that it names
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if not has_part(Path(model), name)}
        self.dtype = getattr(torch, dtype)
        self.pipe: Any = StableDiffusion3Pipeline.from_pretrained(
            model, torch_dtype=self.dtype, use_safetensors=True, **absent
        )
        self.device = device_of(wish.get("device", "auto")) if wish else "cpu"
        self.pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        facts = read_facts(Path(model))
        self.steps = steps or facts.get("steps") or 28
        self.guidance = facts.get("guidance")
        self.t5 = not absent
        side = str(self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor)
        sides = [int(pixels) for pixels in (wish.get("size") or side).lower().split("x")]
        self.width, self.height = sides[0], sides[-1]
        self.name = dtype

    @property
    def about(self) -> dict[str, Any]:
        bits = 32 if self.name == "float32" else 16
        engine = f"diffusers eager {self.name}"
        told = {"steps": self.steps, "guidance": self.guidance, "size": [self.width, self.height]}
        return {"engine": engine, "bits": bits, **told}

    def __call__(self, prompts: Sequence[str], seed: int, stages: StageTimer) -> Any:
        import numpy as np
        import torch

        from fewstep.core.sampling import batch_noise

        sides = (side // self.pipe.vae_scale_factor for side in (self.height, self.width))
        noise = batch_noise(
            range(seed, seed + len(prompts)), (self.pipe.transformer.config.in_channels, *sides)
        )
        told: dict[str, Any] = {} if self.t5 else {"max_sequence_length": 0}
        with (
            _timed(self.pipe, "encode_prompt", "text", stages),
            _timed(self.pipe.transformer, "forward", "steps", stages),
            _timed(self.pipe.vae, "decode", "decode", stages),
        ):
            made = self.pipe(
                list(prompts),
                sigmas=np.linspace(1, 1 / self.steps, self.steps).tolist(),  # the scheduler shifts them
                num_inference_steps=self.steps,
                guidance_scale=self.guidance or 1.0,
                latents=torch.from_numpy(noise).to(self.device, self.dtype),
                height=self.height,
                width=self.width,
                output_type="np",
                **told,
            )
        return (made.images * 255).round().clip(0, 255).astype(np.uint8)


class _timed:
    """A method whose time is a stage's, within the block."""

    def __init__(self, owner: Any, name: str, stage: str, stages: StageTimer) -> None:
        self.owner, self.name, self.stage, self.stages = owner, name, stage, stages

    def __enter__(self) -> None:
        whole = getattr(self.owner, self.name)

        def timed(*told: Any, **named: Any) -> Any:
            return self.stages.of(self.stage, lambda: whole(*told, **named))

        setattr(self.owner, self.name, timed)

    def __exit__(self, *error: object) -> None:
        delattr(self.owner, self.name)


def engine(spec: dict[str, Any]) -> Engine:
    """What a spec asks for: ``model``, ``steps``, ``threads`` and, for others' pipelines, ``stock`` or
    ``genai``."""
    given, wish = (spec["model"], spec["steps"], spec["threads"]), spec["wish"]
    if spec.get("genai"):
        from fewstep.bench.genai import GenAI

        return GenAI(*given)
    return DiffusersEngine(*given, spec["stock"], wish) if spec.get("stock") else FewstepEngine(*given, wish)


def peak() -> int:
    """The most memory that this process has held, bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with what the parent held
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(held.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer lines until there are no more."""
    spec = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    draws: Engine | None = None
    for line in sys.stdin:
        job = json.loads(line)
        draws = draws or engine(spec)
        stages = StageTimer()
        begun = time.perf_counter()
        pictures = draws(job["prompts"], job["seed"], stages)
        stages.seconds["whole"] = time.perf_counter() - begun
        if job.get("save"):
            import numpy as np

            np.save(job["save"], pictures)
        told = {
            "seconds": stages.seconds,
            "peak": peak(),
            "device_peak": used.max_memory_allocated() if (used := cuda()) else 0,
            "since": time.time() - spec["begun"],
            **draws.about,
        }
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
