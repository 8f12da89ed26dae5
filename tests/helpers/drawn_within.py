"""A process that draws within several budgets, and says what it planned and what it held; no test itself.

``python drawn_within.py FOLDER`` makes a random model of about half a gigabyte there, and draws when it is
called again: a process that has had large tensors before has a heap of another shape.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fewstep.core.types import UserError
from fewstep.families import sd3
from fewstep.inference.host_memory import rss
from fewstep.inference.load import STARTUP, load
from fewstep.inference.options import TorchOptions
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pocket.config import byte_tokenizer

BUDGETS = (4, 6, 8, 12, 16, 24)
REAL = 17.0
"""GiB of SD3.5 Medium with T5 in 16 bits, that the budgets are for."""

WORDS = 77


def made(folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer = byte_tokenizer(WORDS)
    marks: dict[str, Any] = {
        f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")
    }

    def clip(width: int, layers: int) -> Any:
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=8000, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=WORDS, **marks,
        ))  # fmt: skip

    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 64, 128, 128),
    }  # fmt: skip
    parts = {
        "transformer": SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=8,
            num_attention_heads=8, attention_head_dim=64, caption_projection_dim=512,
            joint_attention_dim=1024, pooled_projection_dim=640, pos_embed_max_size=96,
            dual_attention_layers=(0, 1, 2), qk_norm="rms_norm",
        ),
        "vae": AutoencoderKL(
            **shape, layers_per_block=2, latent_channels=16, sample_size=128, use_quant_conv=False,
            use_post_quant_conv=False, shift_factor=0.0,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": clip(256, 6), "text_encoder_2": clip(384, 8),
        "text_encoder_3": T5EncoderModel(T5Config(
            vocab_size=8000, d_model=1024, d_kv=64, d_ff=2560, num_layers=2, num_heads=16,
            feed_forward_proj="gated-gelu", pad_token_id=marks["pad_token_id"],
        )),
        **{f"tokenizer{which}": tokenizer for which in ("", "_2", "_3")},
    }  # fmt: skip
    sd3.save(sd3.assemble(parts, name="half", steps=4, guidance=None), folder)


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def high() -> int:
    """Most bytes that were resident since :func:`low`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def low() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def draw(folder: Path, memory: str) -> dict[str, Any]:
    low()
    staged = load(folder, sd3.ARCHITECTURE, TorchOptions(memory=memory))
    Pipeline(staged.model)("a red apple", seed=0)
    measured = high() - (staged.plan.base - STARTUP)  # which the first picture of all has taken
    return {"planned": staged.plan.peak, "measured": measured, **vars(staged.plan.config)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    native = draw(folder, "64GiB")["bits"]  # imports are in memory from here on
    whole = weights(folder) * native / 32  # a processor that multiplies bfloat16 holds half of what is stored
    for budget in BUDGETS:
        gc.collect()
        memory = f"{(rss() + STARTUP + whole * budget / REAL) / 2**20:.0f}MiB"
        try:
            row = draw(folder, memory)
        except UserError as error:
            row = {"refused": str(error)}
        print(json.dumps({"budget": budget, **row}), flush=True)


if __name__ == "__main__":
    if Path(sys.argv[1]).exists():
        main(Path(sys.argv[1]))
    else:
        torch.manual_seed(0)
        made(Path(sys.argv[1]))
