"""FLUX.1 of Black Forest Labs, dev and schnell, through diffusers and transformers.

A T5 makes the context and a CLIP the pooled vector. A net of double- and then single-stream blocks predicts
the velocity on tokens of 2 x 2 latents. An autoencoder makes the pixels. Packing, positions, embedded
guidance and the scaling of latents stay in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Array, Cond, UserError
from fewstep.core.validate import check_int
from fewstep.families.base import Architecture, Family
from fewstep.families.common import Reader, family_of_parts, warn_of_cuts
from fewstep.families.lora import original_names
from fewstep.families.net_classes import (
    SHARED_CLASSES,
    VAE_CLASSES,
    Layers,
    NetClass,
    Patch,
    Width,
    Widths,
)
from fewstep.families.schedulers import of_scheduler, schedule_shift

if TYPE_CHECKING:
    import torch

GUIDANCE = 3.5
"""The default scale of embedded guidance in diffusers."""

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2", "proj_mlp", "proj_out"),
)
"""Ends of the names of the linear layers that a LoRA adapts: attention and MLP of both kinds of block."""

SIDE = 128
"""Default side of an image in latent cells: 1024 pixels."""

MAX_SIDE = 1024

PATCH = 2
"""Latent cells along a side of a token."""


@dataclass(frozen=True)
class TransformerConfig:
    """The configuration of ``FluxTransformer2DModel``."""

    in_channels: Width
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    pooled_projection_dim: Width
    patch_size: Patch = 1
    out_channels: Width | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    guidance_embeds: bool = False
    axes_dims_rope: Widths = (16, 56, 56)

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(axis % 2 for axis in axes):
            raise ValueError("axes_dims_rope must be three even numbers whose sum is attention_head_dim")


@dataclass(frozen=True)
class NetVelocity:
    """``FluxTransformer2DModel`` as a velocity.

    Attributes:
        net: the torch module.
        guidance: the embedded guidance scale; a net without an embedding of it (schnell) ignores it.
    """

    net: Any
    guidance: float = GUIDANCE

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` float32 in [0, 1] -> ``[B, C, H, W]`` float32; ``H``, ``W`` even.

        The net multiplies time and guidance by 1000 after rounding them to its own dtype. In half precision
        .749 becomes .75, here as in diffusers' pipeline.
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
        """Return the same velocity at another scale of the embedded guidance."""
        return replace(self, guidance=scale)

    def embedder_inputs(self, t: Array, pooled: Array) -> tuple[Array, ...]:
        """Return the inputs of the net's embedder at ``t [B]`` (:mod:`fewstep.modules.adaln`)."""
        dtype = self.net.dtype
        scale = [t.new_full(t.shape, self.guidance)] if self.net.config.guidance_embeds else []
        return *(1000 * each.to(dtype) for each in (t, *scale)), pooled.to(dtype)


def pack(x: Array) -> Array:
    """Latents ``[B, C, 2h, 2w]`` -> tokens ``[B, h w, 4C]``, row by row; in a token ``C`` varies slowest."""
    import torch

    return torch.nn.functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Array, rows: int, columns: int) -> Array:
    """The inverse of :func:`pack`: ``[B, rows columns, 4C]`` -> ``[B, C, 2 rows, 2 columns]``."""
    import torch

    patches = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return torch.nn.functional.pixel_shuffle(patches, PATCH)


def positions(rows: int, columns: int, device: torch.device | str | None = None) -> Array:
    """Return the position ``(0, row, column)`` of each token, for rotary embeddings (arXiv 2104.09864).

    Text tokens are at (0, 0, 0).

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


NETS = {
    "transformer": ("FluxTransformer2DModel",),
    "vae": VAE_CLASSES,
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
}
NET_CLASSES = {**SHARED_CLASSES, "FluxTransformer2DModel": NetClass("transformer", TransformerConfig)}


class Flux(Architecture):
    """The family of FLUX.1 dev and schnell."""

    name = "flux"
    pipeline = "FluxPipeline"
    nets = NETS
    net_classes = NET_CLASSES
    required = (
        *("transformer", "vae", "scheduler"),
        *("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    )
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = TARGETS
    lora_names = original_names.FLUX

    def assemble(
        self,
        parts: Mapping[str, Any],
        *,
        name: str,
        steps: int | None = None,
        guidance: float | None = None,
        side: int | None = None,
        device: str = "cpu",
    ) -> Family:
        """Return a model made of components; see :meth:`fewstep.families.base.Architecture.assemble`.

        Args:
            parts: components by their diffusers names.
            name: the model's name for the user.
            steps: default number of steps; by default 28 with embedded guidance (dev), 4 without (schnell).
            guidance: the scale that a net with embedded guidance is given; by default 3.5. The model's own
                ``guidance`` is ``None``: there is no second pass.
            side: default side of an image in latent cells, an even number; by default 128.
            device: torch device.

        Raises:
            UserError: ``side`` is no such number.
        """
        side = SIDE if side is None else side
        if check_int("side", side, PATCH, MAX_SIDE) % PATCH:
            raise UserError(f"side must be an even number, not {side}")
        guidance = GUIDANCE if guidance is None else guidance
        net = parts["transformer"]
        dev = net.config.guidance_embeds
        return family_of_parts(
            parts,
            architecture=self,
            device=device,
            name=name,
            velocity=NetVelocity(net, guidance),
            text=Text(parts, self.t5_length({"guidance_embeds": dev})),
            latent=(net.config.in_channels // PATCH**2, side, side),
            shift=schedule_shift(of_scheduler(parts["scheduler"]), (side // PATCH) ** 2),
            steps=steps or (28 if dev else 4),
            guidance=None,
            embedded_guidance=guidance if dev else None,
        )

    def facts(self, family: Family) -> dict[str, object]:
        """Return what a folder says beyond diffusers' files: the embedded scale and the side, too."""
        velocity = family.velocity
        scale = velocity.guidance if isinstance(velocity, NetVelocity) else GUIDANCE
        return {"name": family.name, "steps": family.steps, "guidance": scale, "side": family.latent[1]}

    def assemble_options(self, facts: Mapping[str, object]) -> dict[str, Any]:
        """Return the options that facts set; a scale of ``None`` is none."""
        return {key: facts[key] for key in ("steps", "guidance", "side") if facts.get(key) is not None}

    def patch(self, config: Mapping[str, Any]) -> int:
        """Return 2: the net's own ``patch_size`` of 1 counts packed tokens."""
        return PATCH

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return the channels before packing."""
        return int(config["in_channels"]) // PATCH**2

    def side(self, config: Mapping[str, Any]) -> int:
        """Return 128; no configuration says it."""
        return SIDE

    def t5_length(self, config: Mapping[str, Any]) -> int:
        """Return the most tokens of T5: 512 for dev, 256 for schnell."""
        return 512 if config.get("guidance_embeds") else 256

    def context_length(self, tokens: Mapping[str, int]) -> int:
        """Return the rows of T5; CLIP gives the pooled vector alone."""
        return tokens["text_encoder_2"]


ARCHITECTURE = Flux()
assemble, load, save = ARCHITECTURE.assemble, ARCHITECTURE.load, ARCHITECTURE.save
