"""What several recipes share: putting a Pocket together, its batches, its contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.families import Family
from fewstep.types import Batch, Cond, UserError


def pocket_of(codec: Path, text: Path, seed: int, device: str) -> Family:
    """A Pocket with a trained autoencoder and trained text encoders, and a fresh MMDiT.

    Raises:
        UserError: one of the folders is missing or incomplete.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

    from fewstep.families import pocket, sd3

    for folder, recipe in ((codec, "pocket-codec"), (text, "pocket-text")):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; train it first: fewstep train {recipe}")
    clips = [
        CLIPTextModelWithProjection.from_pretrained(text / name)
        for name in ("text_encoder", "text_encoder_2")
    ]
    family = pocket.build(
        seed,
        codec=AutoencoderKL.from_pretrained(codec),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        texts=(clips[0], clips[1], T5EncoderModel.from_pretrained(text / "text_encoder_3")),
    )
    with torch.no_grad():
        pocket.zero_gates(family.net)
    return sd3.assemble(family.parts, name=family.name, device=device)


def weights_of(folder: Path) -> Path:
    """The weights' file of a diffusers part.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder} holds no .safetensors weights")
    return found[0]


def conditioned(family: Family, latents: Any, prompts: Sequence[str], t5: bool) -> Batch:
    """A training batch: numpy latents ``[B, C, H, W]`` and encoded captions, with T5's tokens or without."""
    import torch

    return Batch(torch.from_numpy(latents).float(), encoded(family, prompts, t5), prompts)


def encoded(family: Family, prompts: Sequence[str], t5: bool) -> Cond:
    """Captions to their condition, with T5's tokens or without any."""
    from fewstep.families.sd3 import Text

    if t5:
        return family.text(prompts)
    return Text({**family.parts, "text_encoder_3": None})(prompts)


def contact_sheet(
    family: Family, net: Any, prompts: Sequence[str], *, steps: int, guidance: float | None, grid: Any = None
) -> Any:
    """Pictures of fixed prompts and seeds by ``net``, without T5, as one Pillow image."""
    import torch

    from fewstep import guide, sample, times
    from fewstep.evaluate.sheet import sheet
    from fewstep.families.sd3 import NetVelocity

    noise = family.lift(sample.noises(range(len(prompts)), family.latent))
    velocity: Any = NetVelocity(net)
    with torch.no_grad():
        if guidance is not None:
            velocity = guide.Guided(velocity, encoded(family, [""], False), guidance)
        walked = sample.walk(
            velocity, noise, grid or times.grid(steps, family.shift), encoded(family, prompts, False)
        )
        images = family.codec.decode(walked).clamp(-1, 1)
    return sheet(images.add(1).mul(127.5).round().byte().cpu().numpy(), list(prompts), columns=4)
