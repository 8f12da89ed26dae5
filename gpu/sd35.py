#!/usr/bin/env python3
"""Measure the shape of SD3.5 Medium with random weights on a GPU, beside the diffusers baseline.

    OUT=out python gpu/sd35.py [--max-minutes 9] [--sizes 1024,512] [--tiny]

Writes JSON lines to ``$OUT/sd35.jsonl``: seconds per image (a median after a warm-up), the predicted and the
measured peak memory (``torch.cuda.max_memory_allocated`` and the memory of CUDA graphs), and time and peak
memory of each stage. ``--tiny`` runs tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fewstep.families.presets import SD35_MEDIUM
from fewstep.families.safetensors_match import tied
from fewstep.families.safetensors_weights import Weights
from fewstep.families.spec import ModelSpec
from fewstep.images.psnr import psnr
from fewstep.inference.load import load_spec
from fewstep.inference.meta_init import init_from_config, init_on_meta
from fewstep.inference.offloaded import Codec, OffloadedVelocity
from fewstep.inference.options import TorchOptions
from fewstep.inference.prompt_cache import CachedTextEncoder
from fewstep.inference.student_weights import Student
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pocket.config import byte_tokenizer

PROMPT = "a red apple on a wooden table, morning light"
STEPS = 4
LIMITS_GIB = (4, 6, 8, 12, 16, 24)
STUDENT = Student("random", STEPS, None, "euler", None, t5=True)


@dataclass(frozen=True)
class Random(Weights):
    """Random weights of a part. Each tensor is drawn when it is read, from a seed of its name."""

    shape_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    device: str = "cpu"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shape_of

    def kind(self, name: str) -> str:
        return "BF16"

    def read(self, name: str) -> Tensor:
        shape = self.shape_of[name]
        # Matrices keep the scale of their input.
        scale = 0.02 if name.endswith("bias") else math.prod(shape[1:]) ** -0.5
        return scale * self._draw(name, shape)

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        height, width = (len(range(*part.indices(side))) for part, side in zip(cut, shape, strict=False))
        return self._draw(name, (height, width, shape[-1]))

    def _draw(self, name: str, shape: Sequence[int]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.folder}/{name}".encode()))
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)


def random_weights(spec: ModelSpec, part: str) -> Weights:
    """Return random weights of a part, on the device."""
    net = init_on_meta(spec, part, torch.bfloat16)
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items() if name not in tied(net)}
    return Random(Path(part), {}, shape_of=shapes, device=DEVICE)


def build_spec(tiny: bool) -> ModelSpec:
    """Return the specification of SD3.5 Medium with byte tokenizers, for its weights are random anyway."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    spec = SD35_MEDIUM
    max_tokens = dict(spec.max_tokens)
    if tiny:
        spec = shrink(spec)
    others: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    for suffix in ("", "_2", "_3"):
        others[f"tokenizer{suffix}"] = byte_tokenizer(max_tokens[f"text_encoder{suffix}"])
    return replace(spec, others=others)


def shrink(spec: ModelSpec) -> ModelSpec:
    """Return a specification with narrow parts of the same kinds."""
    configs = {part: dict(config) for part, config in spec.configs.items()}
    configs["transformer"] |= {
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
        "joint_attention_dim": 64, "pooled_projection_dim": 56, "pos_embed_max_size": 16, "sample_size": 8,
        "dual_attention_layers": (0,),
    }  # fmt: skip
    configs["vae"] |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    for part, width in (("text_encoder", 24), ("text_encoder_2", 32)):
        configs[part] |= {
            "vocab_size": 600, "hidden_size": width, "intermediate_size": 48, "projection_dim": width,
            "num_hidden_layers": 2, "num_attention_heads": 2,
        }  # fmt: skip
    configs["text_encoder_3"] |= {
        "vocab_size": 600, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
    return replace(spec, configs=configs)


def baseline(spec: ModelSpec, side: int) -> Callable[[], Any]:
    """Return a call of the unmodified diffusers pipeline in eager bfloat16, with all parts on the device."""
    parts: dict[str, Any] = dict(spec.others)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            for part in spec.configs:
                parts[part] = init_from_config(spec, part).to(DEVICE, torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    absent = dict.fromkeys(name for name in ("text_encoder_3", "tokenizer_3") if name not in parts)
    pipe = StableDiffusion3Pipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    # Without T5 the pipeline feeds 256 rows of zeros to the net, as it does for every user.
    return lambda: pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, height=side, width=side)


def fewstep_pipeline(spec: ModelSpec, side: int, **options: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return a call of the fewstep pipeline, and its memory plan."""
    loaded = load_spec(
        spec,
        replace(STUDENT, t5=spec.t5 is not None),
        TorchOptions(size=str(side), **options),
        random_weights,
    )
    pipe = Pipeline(loaded.model)
    plan = loaded.plan
    facts = {**vars(plan.config), "planned_gib": plan.peak / 2**30 if plan.stages else None}
    text: Any = loaded.model.text

    def draw() -> Any:
        text.clear_cache()  # the baseline encodes the prompt in each call, too
        return pipe(PROMPT, seed=0)

    return draw, facts


def measure(draw: Callable[[], Any], times: int) -> tuple[dict[str, Any], Any]:
    """Return median seconds, peak memory, time and memory of each stage, and the last images."""
    seconds: list[float] = []
    images: Any = None
    for _ in range(times + 1):
        start = time.perf_counter()
        images = draw()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() + graph_memory() - LEFT[0] if CUDA else 0
    row = {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "measured_gib": peak / 2**30}
    return row | measure_stages(draw), images


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def graph_memory() -> int:
    """Return the bytes in pools of CUDA graphs that the allocator does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(
        s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)
    )


STAGES = (
    (CachedTextEncoder, "prepare", "text"), (OffloadedVelocity, "_modulations", "modulations"),
    (OffloadedVelocity, "_velocity", "steps"),
    (Codec, "decode", "decode"), (StableDiffusion3Pipeline, "encode_prompt", "text"),
    (SD3Transformer2DModel, "forward", "steps"), (AutoencoderKL, "decode", "decode"),
)  # fmt: skip
"""Methods that are stages of an image, of fewstep and of the baseline."""


def measure_stages(draw: Callable[[], Any]) -> dict[str, Any]:
    """Return milliseconds and peak memory of each stage, in one more image that waits after each stage."""
    spent: dict[str, float] = {}
    peaks: dict[str, float] = {}
    active: list[str] = []

    def timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if active:
                return function(*args, **options)
            synchronize()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            active.append(stage)
            start = time.perf_counter()
            try:
                out = function(*args, **options)
                synchronize()
            finally:
                active.clear()
            spent[stage] = spent.get(stage, 0.0) + 1000 * (time.perf_counter() - start)
            if CUDA:
                peak = (torch.cuda.max_memory_allocated() - LEFT[0]) / 2**30
                peaks[stage] = max(peaks.get(stage, 0.0), peak)
            return out

        return run

    with ExitStack() as stack:
        for owner, name, stage in STAGES:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), stage)))
        draw()
    return {
        "stages_ms": {stage: round(ms, 1) for stage, ms in spent.items()},
        "stages_gib": {stage: round(gib, 2) for stage, gib in peaks.items()},
    }


LEFT = [0]
"""Bytes that earlier rows left on the GPU, such as workspaces and CUDA graphs."""


def reset_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        LEFT[0] = torch.cuda.memory_allocated() + graph_memory()


Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""The settings of a row, and a function that measures the rest of it."""


def cases(spec: ModelSpec, sizes: Sequence[int], times: int, tiny: bool) -> list[Case]:
    """Return the cases to measure, the most important first."""
    without_t5 = spec.without("text_encoder_3")

    def ours(t5: bool, side: int, rounds: int = times, **options: Any) -> Case:
        def run() -> dict[str, Any]:
            draw, facts = fewstep_pipeline(spec if t5 else without_t5, side, **options)
            row, images = measure(draw, rounds)
            pixels = np.asarray(images[0])
            similarity = psnr(references.setdefault((t5, side), pixels), pixels)
            quality = {
                "psnr": similarity if math.isfinite(similarity) else None,
                "contrast": float(pixels.std()),
            }
            return {**facts, **row, **quality}

        return {"who": "fewstep", "t5": t5, "size": side, **options}, run

    def diffusers(t5: bool, side: int) -> Case:
        def run() -> dict[str, Any]:
            return measure(baseline(spec if t5 else without_t5, side), times)[0]

        return {"who": "diffusers", "t5": t5, "size": side}, run

    def compiled(t5: bool, side: int, **options: Any) -> Case:
        return ours(t5, side, **options, compile=not tiny)

    references: dict[tuple[bool, int], np.ndarray] = {}  # the first image of its kind, for the PSNR of others
    large, *smaller = sizes
    least = [] if tiny else [compiled(False, large, bits=4, memory="3.25GiB")]
    eager = [ours(False, large, 2, bits=bits) for bits in ((16,) if tiny else (16, 8, 4))]
    limits = LIMITS_GIB[-1:] if tiny else LIMITS_GIB
    limited = [ours(t5, large, 1, memory=f"{gib}GiB") for t5 in (False, True) for gib in limits]
    return [
        *(diffusers(False, large), compiled(False, large, bits=16, memory="7GiB")),
        compiled(False, large, bits=16), *least, *eager,
        *(case for side in smaller for case in (diffusers(False, side), compiled(False, side, bits=16))),
        *limited,
        *(diffusers(True, large), compiled(True, large, bits=16)),
        *([] if tiny else [compiled(False, large, bits=8)]),
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-minutes", type=float, default=9.0)
    parser.add_argument("--sizes", help="[default: 1024,512; of --tiny 64,32]")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="rows that an earlier command did")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    if not CUDA and not given.tiny:
        print("torch finds no GPU: --tiny runs tiny shapes on a CPU", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * given.max_minutes
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    sizes = [int(side) for side in (given.sizes or ("64,32" if given.tiny else "1024,512")).split(",")]
    measured = 0
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    with (out / "sd35.jsonl").open("w", encoding="utf-8") as file, torch.no_grad():
        for facts, run in cases(build_spec(given.tiny), sizes, given.times, given.tiny)[given.skip :]:
            reset_memory()
            if time.monotonic() > end:
                row: dict[str, Any] = {"left_out": "no time"}
            else:
                try:
                    row = run()
                    measured += 1
                except Exception as error:  # the row reports its error, and the others run
                    row = {"error": " ".join(str(error).split())[:300]}
            line = json.dumps({"device": device, "torch": torch.__version__, **facts, **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    return 0 if measured else 1


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
