#!/usr/bin/env python3
"""SD3.5 Medium's shape with random weights on the GPU that is there: ours against stock diffusers.

    OUT=out python gpu/sd35.py [--minutes 9] [--sizes 1024,512] [--tiny]

Writes JSON lines to ``$OUT/sd35.jsonl``: seconds of a picture (median of a few, after one that is not
counted) and peaks of ``torch.cuda.max_memory_allocated``, planned ones beside them. ``--tiny`` is a rehearsal
on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.families.pocket import byte_tokenizer
from fewstep.pipeline import Pipeline
from fewstep.staged import Wish
from fewstep.staged.bare import bare, made
from fewstep.staged.load import staged
from fewstep.staged.outline import SD35_MEDIUM, Outline
from fewstep.staged.student import Student
from fewstep.staged.weights import Weights

PROMPT = "a red apple on a wooden table, morning light"
STEPS = 4
BUDGETS = (4, 6, 8, 12, 16, 24)
STUDENT = Student("random", STEPS, None, "euler", 3.0, t5=True)


@dataclass(frozen=True)
class Random(Weights):
    """Weights of a part drawn where they are asked for."""

    shapes: dict[str, tuple[int, ...]]
    device: str

    def read(self, name: str) -> Tensor:
        scale = 1.0 if name.endswith("norm.weight") else 0.02
        return scale * torch.randn(self.shapes[name], device=self.device, dtype=torch.bfloat16)

    def window(self, name: str, shape: Sequence[int], cut: tuple[slice, ...]) -> Tensor:
        height, width = (len(range(*part.indices(side))) for part, side in zip(cut, shape, strict=False))
        return torch.randn(height, width, shape[-1], device=self.device, dtype=torch.bfloat16)


def random(outline: Outline, part: str) -> Weights:
    """The weights of a part, on the device."""
    net = bare(outline, part, torch.bfloat16)
    held = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    return Random(Path(part), {}, {name: tuple(t.shape) for name, t in held}, DEVICE)


def model(tiny: bool) -> Outline:
    """The outline with tokenizers that know bytes alone: what they say is as random as the weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    outline = SD35_MEDIUM
    words = dict(outline.words)
    if tiny:
        outline = small(outline)
    others: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    for which in ("", "_2", "_3"):
        others[f"tokenizer{which}"] = byte_tokenizer(words[f"text_encoder{which}"])
    return replace(outline, others=others)


def small(outline: Outline) -> Outline:
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


def stock(outline: Outline, side: int) -> Callable[[], Any]:
    """Stock diffusers in eager bf16, all of it on the device."""
    from diffusers import StableDiffusion3Pipeline

    parts: dict[str, Any] = dict(outline.others)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            for part in outline.configs:
                parts[part] = made(outline, part).to(DEVICE, torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    absent = dict.fromkeys(name for name in ("text_encoder_3", "tokenizer_3") if name not in parts)
    pipe = StableDiffusion3Pipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, height=side, width=side
    )  # without T5 it feeds 256 rows of zeros in its place, as anybody's does


def ours(outline: Outline, side: int, **wish: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Ours, and what was planned."""
    done = staged(outline, replace(STUDENT, t5=outline.t5 is not None), Wish(size=str(side), **wish), random)
    pipe = Pipeline(done.model)
    plan = done.plan
    facts = {**vars(plan.choice), "planned_gib": plan.peak / 2**30 if plan.stages else None}
    text: Any = done.model.text

    def draw() -> Any:
        text.forget()  # so that encoders are in the time, as they are in stock's
        return pipe(PROMPT, seed=0)

    return draw, facts


def timed(draw: Callable[[], Any], times: int) -> dict[str, float]:
    """Median seconds, and the peak of all calls and of what made them."""
    seconds: list[float] = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        draw()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    return {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "measured_gib": peak / 2**30}


def fresh() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What is told of a row, and what makes the rest of it."""


def cases(whole: Outline, sizes: Sequence[int], times: int, tiny: bool) -> list[Case]:
    """What is run, the most wanted first."""
    clips = whole.without("text_encoder_3")

    def ran(t5: bool, side: int, many: int = times, **wish: Any) -> Case:
        def run() -> dict[str, Any]:
            draw, facts = ours(whole if t5 else clips, side, **wish)
            return {**facts, **timed(draw, many)}

        return {"who": "ours", "t5": t5, "size": side, **wish}, run

    def stocks(t5: bool, side: int) -> Case:
        return {"who": "stock", "t5": t5, "size": side}, lambda: timed(
            stock(whole if t5 else clips, side), times
        )

    sides = [(t5, side) for t5 in (False, True) for side in sizes]
    beside = [[stocks(*at), *(ran(*at, bits=bits) for bits in (16, 8, 4))] for at in sides]
    budgets = BUDGETS[-1:] if tiny else BUDGETS
    within = [ran(t5, sizes[0], 1, memory=f"{b}GiB") for b in budgets for t5 in (True, False)]
    quick = [] if tiny else [ran(False, side, bits=b, compile=True) for side in sizes for b in (16, 8)]
    return [*beside[0], *quick, *(case for cases in beside[1:] for case in cases), *within]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--sizes", default="1024,512")
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
    sizes = [int(side) for side in given.sizes.split(",")]
    card = torch.cuda.get_device_name() if CUDA else "cpu"
    with (out / "sd35.jsonl").open("w", encoding="utf-8") as file, torch.no_grad():
        for facts, run in cases(model(given.tiny), sizes, given.times, given.tiny)[given.skip :]:
            fresh()
            if time.monotonic() > end:
                row: dict[str, Any] = {"left_out": "no time"}
            else:
                try:
                    row = run()
                except Exception as error:  # a row that fails says so; the others go on
                    row = {"error": " ".join(str(error).split())[:300]}
            line = json.dumps({"device": card, "torch": torch.__version__, **facts, **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    return 0


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
