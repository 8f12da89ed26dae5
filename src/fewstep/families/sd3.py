"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206) through diffusers and transformers.

Two CLIPs and an optional T5 make the context. An MMDiT predicts the velocity, and an autoencoder makes the
pixels. The factor 1000 of time, the scaling of latents and the padding of text stay in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Array, Cond
from fewstep.families.base import Architecture, Family
from fewstep.families.common import Reader, family_of_parts, warn_of_cuts
from fewstep.families.lora import original_names
from fewstep.families.net_classes import (
    SHARED_CLASSES,
    VAE_CLASSES,
    Indices,
    Layers,
    NetClass,
    Patch,
    Side,
    Width,
)
from fewstep.families.schedulers import of_scheduler, schedule_shift

if TYPE_CHECKING:
    import torch

CLIPS = ("", "_2")
CLIP_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
T5 = ("tokenizer_3", "text_encoder_3")
"""The parts that may be absent."""

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
"""Ends of the names of the linear layers that a LoRA adapts: attention and MLP of both streams."""

T5_LENGTH = 256
"""Most tokens of T5, as in diffusers; a tokenizer may allow fewer."""


@dataclass(frozen=True)
class TransformerConfig:
    """The configuration of ``SD3Transformer2DModel``."""

    sample_size: Side
    patch_size: Patch
    in_channels: Width
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    pos_embed_max_size: Side
    num_layers: Layers = 18
    caption_projection_dim: Width = 1152
    pooled_projection_dim: Width = 2048
    out_channels: Width | None = 16
    dual_attention_layers: Indices = ()
    qk_norm: str | None = None


@dataclass(frozen=True)
class NetVelocity:
    """``SD3Transformer2DModel`` as a velocity."""

    net: Any

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` float32 in [0, 1] -> ``[B, C, H, W]`` float32."""
        dtype = self.net.dtype
        v = self.net(
            hidden_states=x_t.to(dtype),
            timestep=1000 * t,  # stays float32: bf16 has no 749.25
            encoder_hidden_states=cond.context.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            return_dict=False,
        )[0]
        return v.float()

    def embedder_inputs(self, t: Array, pooled: Array) -> tuple[Array, ...]:
        """Return the inputs of the net's embedder at ``t [B]`` (:mod:`fewstep.modules.adaln`)."""
        return 1000 * t, pooled.to(self.net.dtype)


@dataclass(frozen=True)
class Text:
    """The two CLIPs side by side, padded to the net's width, and T5's tokens after them.

    Without T5 the context ends after the CLIPs' tokens, where diffusers appends rows of zeros.
    """

    parts: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` prompts -> context ``[B, L, D]`` and pooled ``[B, P]``, float32."""
        import torch

        warn_of_cuts(prompts, self.readers)
        with torch.no_grad():
            clips = [self._clip(prompts, which) for which in CLIPS]
            context = torch.cat([tokens for tokens, _ in clips], dim=-1)
            room = self.parts["transformer"].config.joint_attention_dim - context.shape[-1]
            context = torch.nn.functional.pad(context, (0, room))
            if self.parts["text_encoder_3"] is not None:
                context = torch.cat([context, self._t5(prompts)], dim=1)
            pooled = torch.cat([pooled for _, pooled in clips], dim=-1)
        return Cond(context.float(), pooled.float())

    @property
    def clip_length(self) -> int:
        """Rows of a context before T5's."""
        return min(self._clip_length(which) for which in CLIPS)

    def _clip_length(self, which: str) -> int:
        most = self.parts[f"text_encoder{which}"].config.max_position_embeddings
        return min(self.parts["tokenizer"].model_max_length, most)

    def _clip(self, prompts: Sequence[str], which: str) -> tuple[Array, Array]:
        encoder = self.parts[f"text_encoder{which}"]
        ids = self._reader(which)(prompts)
        out = encoder(ids.to(encoder.device), output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds

    def _t5(self, prompts: Sequence[str]) -> Array:
        encoder = self.parts["text_encoder_3"]
        return encoder(self._t5_reader(prompts).to(encoder.device))[0]

    @property
    def readers(self) -> list[Reader]:
        """The tokenizers of all text encoders that are there."""
        third = [] if self.parts["text_encoder_3"] is None else [self._t5_reader]
        return [*(self._reader(which) for which in CLIPS), *third]

    def _reader(self, which: str) -> Reader:
        tokenizer, config = self.parts[f"tokenizer{which}"], self.parts[f"text_encoder{which}"].config
        return Reader("CLIP", tokenizer, self._clip_length(which), config.vocab_size)

    @property
    def _t5_reader(self) -> Reader:
        tokenizer, config = self.parts["tokenizer_3"], self.parts["text_encoder_3"].config
        return Reader("T5", tokenizer, min(T5_LENGTH, tokenizer.model_max_length), config.vocab_size)


NETS = {
    "transformer": ("SD3Transformer2DModel",),
    "vae": VAE_CLASSES,
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
}
NET_CLASSES = {**SHARED_CLASSES, "SD3Transformer2DModel": NetClass("transformer", TransformerConfig)}


class SD3(Architecture):
    """The family of Stable Diffusion 3 and 3.5."""

    name = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    nets = NETS
    net_classes = NET_CLASSES
    required = ("transformer", "vae", "scheduler", *CLIP_PARTS)
    optional = T5
    hidden_states = frozenset(("text_encoder", "text_encoder_2"))
    position_table = "pos_embed.pos_embed"
    lora_targets = TARGETS
    lora_names = original_names.SD3
    single_files = True

    def assemble(
        self,
        parts: Mapping[str, Any],
        *,
        name: str,
        steps: int | None = None,
        guidance: float | None = 4.5,
        side: int | None = None,
        device: str = "cpu",
    ) -> Family:
        """Return a model made of components; see :meth:`fewstep.families.base.Architecture.assemble`.

        Args:
            parts: components by their diffusers names; ``tokenizer_3`` and ``text_encoder_3`` may be left
                out or ``None``.
            name: the model's name for the user.
            steps: default number of steps; by default 28.
            guidance: default guidance scale; ``None`` when guidance is distilled into the net.
            side: default side of an image in latent cells; by default the net's ``sample_size``.
            device: torch device.
        """
        parts = {**dict.fromkeys(T5), **parts}
        config, text = parts["transformer"].config, Text(parts)
        width = side or config.sample_size
        return family_of_parts(
            parts,
            architecture=self,
            device=device,
            name=name,
            velocity=NetVelocity(parts["transformer"]),
            text=text,
            latent=(config.in_channels, width, width),
            shift=schedule_shift(of_scheduler(parts["scheduler"]), (width // config.patch_size) ** 2),
            steps=steps or 28,
            guidance=guidance,
            clip_length=text.clip_length,
        )

    def read_file(
        self, path: Path, config: str | Path | None, dtype: torch.dtype, t5: bool | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the components of a single-file checkpoint in Stability's key names, and its facts."""
        from fewstep.families.single_file import read_single

        return read_single(self, path, config, dtype, t5)

    def max_patches(self, config: Mapping[str, Any]) -> int:
        """Return the side of the table of positions."""
        return int(config.get("pos_embed_max_size") or 512)

    def t5_length(self, config: Mapping[str, Any]) -> int:
        """Return the most tokens of T5."""
        return T5_LENGTH

    def context_length(self, tokens: Mapping[str, int]) -> int:
        """Return the rows of the two CLIPs, which stand side by side, and those of T5."""
        return min(tokens["text_encoder"], tokens["text_encoder_2"]) + tokens.get("text_encoder_3", 0)

    def few_blocks(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return a configuration with few blocks; the first keeps its second attention."""
        dual = {"dual_attention_layers": (0,)} if config.get("dual_attention_layers") else {}
        return {**super().few_blocks(config, count), **dual}


ARCHITECTURE = SD3()
assemble, load, save = ARCHITECTURE.assemble, ARCHITECTURE.load, ARCHITECTURE.save
