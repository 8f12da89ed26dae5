#!/usr/bin/env python3
"""SD3.5 Medium's shape with random weights on the GPU that is there: ours against stock diffusers.

    OUT=out python gpu/sd35.py [--max-minutes 9] [--sizes 1024,512] [--tiny]

Writes JSON lines to ``$OUT/sd35.jsonl``: seconds of a picture (median of a few, after one that is not
counted), peaks of ``torch.cuda.max_memory_allocated`` and what recordings keep beside it, planned ones beside
them, and what each stage takes and holds. ``--tiny`` is a rehearsal on a CPU.
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
from fewstep.families.safetensors_reader import Weights, tied
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
BUDGETS = (4, 6, 8, 12, 16, 24)
STUDENT = Student("random", STEPS, None, "euler", None, t5=True)


@dataclass(frozen=True)
class Random(Weights):
    """Weights of a part, drawn where they are asked for: the same ones whoever asks."""

    drawn: dict[str, tuple[int, ...]] = field(default_factory=dict)
    device: str = "cpu"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.drawn

    def kind(self, name: str) -> str:
        return "BF16"

    def read(self, name: str) -> Tensor:
        shape = self.drawn[name]
        # Of matrices so that what they give is as large as what they are given.
        scale = 0.02 if name.endswith("bias") else math.prod(shape[1:]) ** -0.5
        return scale * self._drawn(name, shape)

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        height, width = (len(range(*part.indices(side))) for part, side in zip(cut, shape, strict=False))
        return self._drawn(name, (height, width, shape[-1]))

    def _drawn(self, name: str, shape: Sequence[int]) -> Tensor:
        dice = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.folder}/{name}".encode()))
        return torch.randn(shape, generator=dice, device=self.device, dtype=torch.bfloat16)


def random(outline: ModelSpec, part: str) -> Weights:
    """The weights of a part, on the device."""
    net = init_on_meta(outline, part, torch.bfloat16)
    held = {name: tuple(t.shape) for name, t in net.state_dict().items() if name not in tied(net)}
    return Random(Path(part), {}, drawn=held, device=DEVICE)


def model(tiny: bool) -> ModelSpec:
    """The outline with tokenizers that know bytes alone: what they say is as random as the weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    outline = SD35_MEDIUM
    words = dict(outline.max_tokens)
    if tiny:
        outline = small(outline)
    others: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    for which in ("", "_2", "_3"):
        others[f"tokenizer{which}"] = byte_tokenizer(words[f"text_encoder{which}"])
    return replace(outline, others=others)


def small(outline: ModelSpec) -> ModelSpec:
    """The same kinds of parts, narrow."""
    configs = {part: dict(config) for part, config in outline.configs.items()}
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
    return replace(outline, configs=configs)


def stock(outline: ModelSpec, side: int) -> Callable[[], Any]:
    """Stock diffusers in eager bf16, all of it on the device."""
    parts: dict[str, Any] = dict(outline.others)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            for part in outline.configs:
                parts[part] = init_from_config(outline, part).to(DEVICE, torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    absent = dict.fromkeys(name for name in ("text_encoder_3", "tokenizer_3") if name not in parts)
    pipe = StableDiffusion3Pipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, height=side, width=side
    )  # without T5 it feeds 256 rows of zeros in its place, as anybody's does


def ours(outline: ModelSpec, side: int, **wish: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Ours, and what was planned."""
    done = load_spec(
        outline, replace(STUDENT, t5=outline.t5 is not None), TorchOptions(size=str(side), **wish), random
    )
    pipe = Pipeline(done.model)
    plan = done.plan
    facts = {**vars(plan.config), "planned_gib": plan.peak / 2**30 if plan.stages else None}
    text: Any = done.model.text

    def draw() -> Any:
        text.clear_cache()  # so that encoders are in the time, as they are in stock's
        return pipe(PROMPT, seed=0)

    return draw, facts


def timed(draw: Callable[[], Any], times: int) -> tuple[dict[str, Any], Any]:
    """Median seconds, the peak of all calls and of what made them, what each stage takes; and a picture."""
    seconds: list[float] = []
    made: Any = None
    for _ in range(times + 1):
        begun = time.perf_counter()
        made = draw()
        synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() + recorded() - LEFT[0] if CUDA else 0
    told = {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "measured_gib": peak / 2**30}
    return told | staged_times(draw), made


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def recorded() -> int:
    """Bytes that recordings keep, which the allocator does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(
        s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)
    )


STAGES = (
    (CachedTextEncoder, "prepare", "text"), (OffloadedVelocity, "_modulations", "modulations"),
    (OffloadedVelocity, "_moved", "steps"),
    (Codec, "decode", "decode"), (StableDiffusion3Pipeline, "encode_prompt", "text"),
    (SD3Transformer2DModel, "forward", "steps"), (AutoencoderKL, "decode", "decode"),
)  # fmt: skip
"""What the stages of a picture are called, ours and stock's."""


def staged_times(draw: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds and peak of each stage, in a picture of its own that waits for each to end."""
    spent: dict[str, float] = {}
    peaks: dict[str, float] = {}
    inside: list[str] = []

    def watched(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if inside:
                return function(*args, **options)
            synchronize()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            inside.append(stage)
            begun = time.perf_counter()
            try:
                out = function(*args, **options)
                synchronize()
            finally:
                inside.clear()
            spent[stage] = spent.get(stage, 0.0) + 1000 * (time.perf_counter() - begun)
            if CUDA:
                held = (torch.cuda.max_memory_allocated() - LEFT[0]) / 2**30
                peaks[stage] = max(peaks.get(stage, 0.0), held)
            return out

        return run

    with ExitStack() as stack:
        for owner, name, stage in STAGES:
            stack.enter_context(patch.object(owner, name, watched(getattr(owner, name), stage)))
        draw()
    return {
        "stages_ms": {stage: round(ms, 1) for stage, ms in spent.items()},
        "stages_gib": {stage: round(gib, 2) for stage, gib in peaks.items()},
    }


LEFT = [0]
"""Bytes that earlier rows left on the card (workspaces, what was recorded): no row's own."""


def fresh() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        LEFT[0] = torch.cuda.memory_allocated() + recorded()


Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What is told of a row, and what makes the rest of it."""


def cases(whole: ModelSpec, sizes: Sequence[int], times: int, tiny: bool) -> list[Case]:
    """What is run, the most wanted first."""
    clips = whole.without("text_encoder_3")

    def ran(t5: bool, side: int, many: int = times, **wish: Any) -> Case:
        def run() -> dict[str, Any]:
            draw, facts = ours(whole if t5 else clips, side, **wish)
            row, made = timed(draw, many)
            pixels = np.asarray(made[0])
            alike = psnr(pictures.setdefault((t5, side), pixels), pixels)
            told = {"psnr": alike if math.isfinite(alike) else None, "contrast": float(pixels.std())}
            return {**facts, **row, **told}

        return {"who": "ours", "t5": t5, "size": side, **wish}, run

    def stocks(t5: bool, side: int) -> Case:
        def run() -> dict[str, Any]:
            return timed(stock(whole if t5 else clips, side), times)[0]

        return {"who": "stock", "t5": t5, "size": side}, run

    def quick(t5: bool, side: int, **wish: Any) -> Case:
        return ran(t5, side, **wish, compile=not tiny)

    pictures: dict[tuple[bool, int], np.ndarray] = {}  # of the first row of its kind, for the others' PSNR
    large, *smaller = sizes
    few = [] if tiny else [quick(False, large, bits=4, memory="3.25GiB")]
    plain = [ran(False, large, 2, bits=bits) for bits in ((16,) if tiny else (16, 8, 4))]
    budgets = BUDGETS[-1:] if tiny else BUDGETS
    within = [ran(t5, large, 1, memory=f"{gib}GiB") for t5 in (False, True) for gib in budgets]
    return [
        *(stocks(False, large), quick(False, large, bits=16, memory="7GiB"), quick(False, large, bits=16)),
        *few, *plain,
        *(case for side in smaller for case in (stocks(False, side), quick(False, side, bits=16))),
        *within,
        *(stocks(True, large), quick(True, large, bits=16)),
        *([] if tiny else [quick(False, large, bits=8)]),
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-minutes", type=float, default=9.0)
    parser.add_argument("--sizes", help="[default: 1024,512; of --tiny 64,32]")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="rows that an earlier command has done")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    if not CUDA and not given.tiny:
        print("torch sees no GPU here; --tiny is a rehearsal without one", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * given.minutes
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    sizes = [int(side) for side in (given.sizes or ("64,32" if given.tiny else "1024,512")).split(",")]
    drawn = 0
    card = torch.cuda.get_device_name() if CUDA else "cpu"
    with (out / "sd35.jsonl").open("w", encoding="utf-8") as file, torch.no_grad():
        for facts, run in cases(model(given.tiny), sizes, given.times, given.tiny)[given.skip :]:
            fresh()
            if time.monotonic() > end:
                row: dict[str, Any] = {"left_out": "no time"}
            else:
                try:
                    row = run()
                    drawn += 1
                except Exception as error:  # a row that fails says so; the others go on
                    row = {"error": " ".join(str(error).split())[:300]}
            line = json.dumps({"device": card, "torch": torch.__version__, **facts, **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    return 0 if drawn else 1


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
