"""Load Pocket's trained parts, assemble a Pocket from them, and draw contact sheets with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Cond, UserError, Velocity
from fewstep.families.base import Family
from fewstep.train.preview import decode_grid

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.nn import Module


def check_pocket_folder(folder: Path) -> None:
    """Check that ``folder`` holds parts of a Pocket, without loading them.

    Raises:
        UserError: The folder is missing, or holds a pipeline of another family.
    """
    from fewstep.families import sd3

    if not folder.is_dir():
        raise UserError(f"--init {folder}: no such folder")
    if (folder / "model_index.json").is_file():
        sd3.ARCHITECTURE.read_index(folder, ())


def assemble_pocket(codec: Path, text: Path, init: Path | None, seed: int, device: str) -> Family:
    """Return a Pocket with a trained autoencoder and trained text encoders.

    Args:
        codec: Folder of the autoencoder.
        text: Folder with the tokenizer and the text encoders.
        init: Diffusers folder whose MMDiT is taken; ``None`` makes a fresh one with zero gates.
        seed: Seed of the fresh weights.
        device: Torch device.

    Raises:
        UserError: A folder is missing or incomplete, or the MMDiT is made for other text or latents.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part
    from fewstep.pocket import config as pocket

    for folder, recipe in ((codec, "pocket-vae"), (text, "pocket-text")):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; train it first: fewstep train {recipe}")
    tokenizer = read_part(text, "tokenizer", ("transformers", "CLIPTokenizer"), sd3.ARCHITECTURE)
    *clips, t5 = load_text_encoders(text)
    family = pocket.build(
        seed, codec=load_vae(codec), tokenizer=tokenizer, text_encoders=(clips[0], clips[1], t5)
    )
    with torch.no_grad():
        pocket.zero_gates(family.net)
    parts = {**family.parts}
    if init is not None:
        net = read_part(
            init, "transformer", ("diffusers", "SD3Transformer2DModel"), sd3.ARCHITECTURE, torch.float32
        )
        widths = (
            ("text", net.config.joint_attention_dim, sum(clip.config.hidden_size for clip in clips)),
            (
                "pooled text",
                net.config.pooled_projection_dim,
                sum(clip.config.projection_dim for clip in clips),
            ),
            ("latents", net.config.in_channels, parts["vae"].config.latent_channels),
        )
        for name, expected, actual in widths:
            if expected != actual:
                raise UserError(f"the MMDiT of {init} reads {name} of width {expected}, but gets {actual}")
        parts["transformer"] = net
    return sd3.assemble(parts, name=family.name, device=device)


def load_text_encoders(folder: Path) -> tuple[Any, Any, Any]:
    """Return trained text encoders in float32: two CLIPs, and a T5 or ``None`` where the folder has none.

    Raises:
        UserError: A part is missing or broken.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part

    def read(part: str, class_name: str) -> Any:
        return read_part(folder, part, ("transformers", class_name), sd3.ARCHITECTURE, torch.float32)

    first_clip = read("text_encoder", "CLIPTextModelWithProjection")
    second_clip = read("text_encoder_2", "CLIPTextModelWithProjection")
    t5 = read("text_encoder_3", "T5EncoderModel") if _has_t5(folder) else None
    return first_clip, second_clip, t5


def _has_t5(folder: Path) -> bool:
    """Return whether ``folder`` holds a T5; in a diffusers folder the index decides, too."""
    from fewstep.families.diffusers_io import has_part

    in_index = has_part(folder, "text_encoder_3") if (folder / "model_index.json").is_file() else True
    return in_index and (folder / "text_encoder_3").is_dir()


def load_vae(folder: Path) -> Any:
    """Return a trained ``AutoencoderKL`` in float32.

    Raises:
        UserError: The folder is missing or incomplete.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds an autoencoder")
    entry = ("diffusers", "AutoencoderKL")
    return read_part(folder.parent, folder.name, entry, sd3.ARCHITECTURE, torch.float32)


def weights_file(folder: Path) -> Path:
    """Return the first weights file of a diffusers part.

    Raises:
        UserError: There is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights")
    return files[0]


def encode_prompts(family: Family, prompts: Sequence[str], t5: bool) -> Cond:
    """Encode prompts to a condition, with T5's tokens or without them."""
    from fewstep.families.sd3 import Text

    if t5:
        return family.text(prompts)
    return Text({**family.parts, "text_encoder_3": None})(prompts)


def contact_sheet(
    family: Family, net: Module, prompts: Sequence[str], *, steps: int, guidance: float | None
) -> Image:
    """Draw prompts from fixed seeds with ``net``, without T5, on a contact sheet (a Pillow image)."""
    import torch

    from fewstep.core import sampling, schedule
    from fewstep.core.guidance import Guided
    from fewstep.families.common import cuts_known
    from fewstep.families.sd3 import NetVelocity

    grid = schedule.grid(steps, family.shift)
    velocity: Velocity = NetVelocity(net)
    with torch.no_grad(), cuts_known():
        if guidance is not None:
            velocity = Guided(velocity, encode_prompts(family, [""], False), guidance)
        cond = encode_prompts(family, prompts, False)
        latents = sampling.generate_latents(
            family, cond, range(len(prompts)), grid, velocity=velocity, sampler="euler"
        )
    return decode_grid(family, latents, prompts)
