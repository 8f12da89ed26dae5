"""FLUX.1 of Black Forest Labs, the dev and the schnell kind, through diffusers and transformers.

A T5 makes the context and a CLIP the pooled vector; a net of double- and then single-stream blocks speaks
velocity on tokens of 2 x 2 latents; a KL autoencoder makes the pixels. The adapters below do the packing,
the positions, the embedded guidance and the scaling of latents; nothing above sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.core.types import Array, Cond, UserError
from fewstep.core.validate import check_int
from fewstep.families.base import Family
from fewstep.families.common import Reader, family_of_parts, warn_of_cuts
from fewstep.families.diffusers_io import (
    check_device,
    fetch,
    name_of,
    read_facts,
    read_index,
    read_parts,
    torch_dtype,
    write_folder,
)
from fewstep.families.schedulers import of_scheduler, schedule_shift

PIPELINE = "FluxPipeline"
"""The plain pipeline class of the family."""

REQUIRED = ("transformer", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
GUIDANCE = 3.5
"""The scale that stock diffusers tells a net with embedded guidance."""

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2", "proj_mlp", "proj_out"),
)
"""Ends of the names of the linear layers that a LoRA adapts: attention and MLP of both kinds of block."""

SIDE = 128
"""Latents along a side in stock diffusers: 1024 pixels."""

MOST_SIDE = 1024

PATCH = 2
"""Latents along a side of a token."""


@dataclass(frozen=True)
class NetVelocity:
    """``FluxTransformer2DModel`` as a velocity.

    Attributes:
        net: the torch module.
        guidance: the scale of the guidance that was distilled into the net; a net without an embedding of
            it (schnell) is not told.
    """

    net: Any
    guidance: float = GUIDANCE

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` float32 in [0, 1] -> ``[B, C, H, W]`` float32; ``H``, ``W`` even.

        The net itself multiplies time and guidance by 1000, but first rounds them to its own dtype: a net of
        half precision hears .75 for .749, here as in the stock pipeline.
        """
        dtype = self.net.dtype
        rows, columns = x_t.shape[2] // PATCH, x_t.shape[3] // PATCH
        v = self.net(
            hidden_states=pack(x_t).to(dtype),
            timestep=t,
            guidance=t.new_full(t.shape, self.guidance) if self.net.config.guidance_embeds else None,
            encoder_hidden_states=cond.context.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            txt_ids=t.new_zeros(cond.context.shape[1], 3),
            img_ids=positions(rows, columns, t.device).to(t.dtype),
            return_dict=False,
        )[0]
        return unpack(v.float(), rows, columns)

    def with_guidance(self, scale: float) -> NetVelocity:
        """The same velocity at another scale of the embedded guidance."""
        return replace(self, guidance=scale)

    def embedded(self, t: Array, pooled: Array) -> tuple[Array, ...]:
        """What the net's embedder is told at ``t [B]`` (:mod:`fewstep.modules.adaln`)."""
        dtype = self.net.dtype
        scale = [t.new_full(t.shape, self.guidance)] if self.net.config.guidance_embeds else []
        return *(1000 * told.to(dtype) for told in (t, *scale)), pooled.to(dtype)


def pack(x: Array) -> Array:
    """Latents ``[B, C, 2h, 2w]`` -> tokens ``[B, h w, 4C]``, row by row; in a token ``C`` varies slowest."""
    import torch

    return torch.nn.functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Array, rows: int, columns: int) -> Array:
    """The inverse of :func:`pack`: ``[B, rows columns, 4C]`` -> ``[B, C, 2 rows, 2 columns]``."""
    import torch

    patches = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return torch.nn.functional.pixel_shuffle(patches, PATCH)


def positions(rows: int, columns: int, device: Any = None) -> Array:
    """Where each token lies, ``(0, row, column)``, for the net's rotary embedding (arXiv 2104.09864).

    Words stand at (0, 0, 0).

    Returns:
        ``[rows columns, 3]`` float32, in the order of :func:`pack`, made on ``device``.
    """
    import torch

    with torch.device(device or "cpu"):
        return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


@dataclass(frozen=True)
class Text:
    """T5's tokens as the context, and CLIP's vector at the end of the prompt.

    Attributes:
        parts: components by their diffusers names.
        length: most tokens of T5; a tokenizer made for fewer has fewer.
    """

    parts: Mapping[str, Any]
    length: int

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` prompts -> context ``[B, L, D]`` and pooled ``[B, P]``, float32."""
        import torch

        clip, t5 = self.parts["text_encoder"], self.parts["text_encoder_2"]
        words, tokens = self.readers
        warn_of_cuts(prompts, (words, tokens))
        with torch.no_grad():
            pooled = clip(words(prompts).to(clip.device)).pooler_output
            context = t5(tokens(prompts).to(t5.device))[0]
        return Cond(context.float(), pooled.float())

    @property
    def readers(self) -> tuple[Reader, Reader]:
        """The tokenizers of CLIP and T5."""
        clip, t5 = self.parts["text_encoder"], self.parts["text_encoder_2"]
        most = clip.config.max_position_embeddings
        first, second = self.parts["tokenizer"], self.parts["tokenizer_2"]
        return (
            Reader("CLIP", first, min(most, first.model_max_length), clip.config.vocab_size),
            Reader("T5", second, min(self.length, second.model_max_length), t5.config.vocab_size),
        )


def assemble(
    parts: Mapping[str, Any],
    *,
    name: str,
    steps: int | None = None,
    guidance: float = GUIDANCE,
    side: int = SIDE,
    device: str = "cpu",
) -> Family:
    """Make a family of diffusers components.

    The nets are moved to ``device``, frozen and put into eval mode.

    Args:
        parts: components by their diffusers names.
        name: what the user calls the model.
        steps: default number of steps; by default 28 with embedded guidance (dev) and 4 without (schnell).
        guidance: the scale that a net with embedded guidance is told. The family's own ``guidance`` is
            ``None``: no second pass.
        side: latents along a side of a picture, an even number.
        device: torch device.

    Raises:
        UserError: ``side`` is no such number.
    """
    if check_int("side", side, PATCH, MOST_SIDE) % PATCH:
        raise UserError(f"side must be an even number, not {side}")
    net = parts["transformer"]
    dev = net.config.guidance_embeds
    return family_of_parts(
        parts,
        kind="flux",
        device=device,
        name=name,
        velocity=NetVelocity(net, guidance),
        text=Text(parts, 512 if dev else 256),
        latent=(net.config.in_channels // PATCH**2, side, side),
        shift=schedule_shift(of_scheduler(parts["scheduler"]), (side // PATCH) ** 2),
        steps=steps or (28 if dev else 4),
        guidance=None,
        blocks=[*net.transformer_blocks, *net.single_transformer_blocks],
        embedded_guidance=guidance if dev else None,
    )


def student(teacher: Family, net: Any, name: str, steps: int) -> Family:
    """The teacher with another net, which needs ``steps`` steps; it is told the guidance that the teacher
    is."""
    return assemble(
        {**teacher.parts, "transformer": net},
        name=name,
        steps=steps,
        guidance=GUIDANCE if teacher.embedded_guidance is None else teacher.embedded_guidance,
        side=teacher.latent[1],
        device=str(teacher.net.device),
    )


def load(
    source: str | Path, *, device: str = "cpu", dtype: str = "float32", name: str | None = None
) -> Family:
    """Load a FLUX.1-type model.

    Args:
        source: a diffusers folder or a hub name (``owner/model``).
        device: torch device, e.g. ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        name: what to call the model; by default what the source calls itself.

    Raises:
        UserError: the source is missing, foreign, incomplete or broken, the hub cannot be reached, or
            the device or dtype is unknown.
    """
    kind = torch_dtype(dtype)
    check_device(device)
    path = Path(source)
    if path.is_file():
        raise UserError(f"{path} is a file; FLUX is read from a diffusers folder or a hub name")
    folder = path if path.is_dir() else fetch(str(source), PIPELINE)
    parts = read_parts(folder, read_index(folder, PIPELINE, REQUIRED), REQUIRED, kind)
    facts = read_facts(folder)
    told = {key: facts[key] for key in ("steps", "guidance", "side") if facts.get(key) is not None}
    return assemble(parts, name=name or facts.get("name") or name_of(path), device=device, **told)


def save(family: Family, folder: str | Path) -> None:
    """Write a diffusers folder that stock ``FluxPipeline.from_pretrained`` loads.

    It is written beside its place and renamed; an earlier save there is replaced.

    Raises:
        UserError: something else is in the way, or the disk refuses.
    """
    velocity = family.velocity
    told = velocity.guidance if isinstance(velocity, NetVelocity) else GUIDANCE
    facts = {"name": family.name, "steps": family.steps, "guidance": told, "side": family.latent[1]}
    write_folder(family.parts, folder, PIPELINE, facts)


def fetched(name: str) -> Path:
    """The folder of a hub model.

    Raises:
        UserError: neither a path nor a hub name, or the hub cannot be reached and nothing is cached.
    """
    return fetch(name, PIPELINE)
