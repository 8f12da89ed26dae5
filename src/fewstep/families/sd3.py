"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206) through diffusers and transformers.

Two CLIPs and, where it is there, a T5 make the context; an MMDiT speaks velocity; a KL or tiny
autoencoder makes the pixels. The adapters below do the x1000 of time, the scaling of latents and the
padding of text; nothing above sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.core.types import Array, Cond
from fewstep.families.base import Family
from fewstep.families.common import Reader, family_of_parts, warn_of_cuts
from fewstep.families.diffusers_io import (
    T5,
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

PIPELINE = "StableDiffusion3Pipeline"
"""The plain pipeline class of the family."""

CLIPS = ("", "_2")
REQUIRED = ("transformer", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
"""Ends of the names of the linear layers that a LoRA adapts: attention and MLP of both streams."""

T5_LENGTH = 256
"""Tokens of T5 in stock diffusers; a tokenizer made for fewer has fewer."""


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
        """What the net's embedder is told at ``t [B]`` (:mod:`fewstep.modules.adaln`)."""
        return 1000 * t, pooled.to(self.net.dtype)


@dataclass(frozen=True)
class Text:
    """The two CLIPs side by side, padded to the net's width, and T5's tokens after them.

    Without T5 nothing follows the CLIPs' tokens (stock diffusers appends rows of zeros there).
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


def assemble(
    parts: Mapping[str, Any],
    *,
    name: str,
    steps: int = 28,
    guidance: float | None = 4.5,
    device: str = "cpu",
) -> Family:
    """Make a family of diffusers components.

    The nets are moved to ``device``, frozen and put into eval mode.

    Args:
        parts: components by their diffusers names; ``tokenizer_3`` and ``text_encoder_3`` may be
            left out or ``None``.
        name: what the user calls the model.
        steps: default number of steps.
        guidance: default guidance scale; ``None`` when guidance is distilled into the net.
        device: torch device.
    """
    parts = {**dict.fromkeys(T5), **parts}
    net = parts["transformer"]
    side, text = net.config.sample_size, Text(parts)
    return family_of_parts(
        parts,
        kind="sd3",
        device=device,
        name=name,
        velocity=NetVelocity(net),
        text=text,
        latent=(net.config.in_channels, side, side),
        shift=schedule_shift(of_scheduler(parts["scheduler"]), (side // net.config.patch_size) ** 2),
        steps=steps,
        guidance=guidance,
        blocks=list(net.transformer_blocks),
        clip_length=text.clip_length,
    )


def student(teacher: Family, net: Any, name: str, steps: int) -> Family:
    """The teacher with another MMDiT, which needs ``steps`` steps and no guidance."""
    parts = {**teacher.parts, "transformer": net}
    return assemble(parts, name=name, steps=steps, guidance=None, device=str(teacher.net.device))


def without_t5(family: Family) -> Family:
    """The same model, its context the CLIPs' alone."""
    parts = {**family.parts, **dict.fromkeys(T5)}
    return assemble(
        parts, name=family.name, steps=family.steps, guidance=family.guidance, device=str(family.net.device)
    )


def load(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    t5: bool | None = None,
    name: str | None = None,
    config: str | Path | None = None,
) -> Family:
    """Load an SD3-type model.

    Args:
        source: a diffusers folder, a hub name (``owner/model``), or a single-file ``.safetensors``
            checkpoint in Stability's key names.
        device: torch device, e.g. ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        t5: load T5; ``None`` loads it where it is there.
        name: what to call the model; by default what the source calls itself.
        config: for a single file only: the diffusers folder or hub name that gives the configurations,
            the tokenizers and the text encoders that the file lacks; by default the hub's original.

    Raises:
        UserError: the source is missing, foreign, incomplete or broken, the hub cannot be reached, or
            the device or dtype is unknown.
    """
    kind = torch_dtype(dtype)
    check_device(device)
    path = Path(source)
    if path.is_file():
        from fewstep.families.single_file import read_single

        parts, facts = read_single(path, config, kind, t5)
    else:
        folder = path if path.is_dir() else download(str(source), t5)
        parts = read_folder(folder, kind, t5)
        facts = read_facts(folder)
    named = name or facts.get("name") or name_of(path)
    rest = {key: facts[key] for key in ("steps", "guidance") if key in facts}
    return assemble(parts, name=named, device=device, **rest)


def save(family: Family, folder: str | Path) -> None:
    """Write a diffusers folder that stock ``StableDiffusion3Pipeline.from_pretrained`` loads.

    It is written beside its place and renamed; an earlier save there is replaced. Where T5 is absent, stock
    diffusers asks to be told so: ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.

    Raises:
        UserError: something else is in the way, or the disk refuses.
    """
    facts = {"name": family.name, "steps": family.steps, "guidance": family.guidance}
    write_folder(family.parts, folder, PIPELINE, facts)


def read_folder(folder: Path, dtype: Any, t5: bool | None) -> dict[str, Any]:
    """The components of a diffusers folder, nets in the torch ``dtype``.

    Raises:
        UserError: see :func:`load`.
    """
    index = read_index(folder, PIPELINE, REQUIRED if not t5 else (*REQUIRED, *T5))
    wanted = REQUIRED if t5 is False or any(part not in index for part in T5) else (*REQUIRED, *T5)
    return read_parts(folder, index, wanted, dtype)


def download(name: str, t5: bool | None) -> Path:
    """Fetch a hub model through diffusers, or take it from its cache.

    Raises:
        UserError: neither a path nor a hub name, or the hub cannot be reached and nothing is cached.
    """
    return fetch(name, PIPELINE, dict.fromkeys(T5) if t5 is False else {})


def snapshot_path(name: str) -> Path:
    """The folder of a hub model.

    Raises:
        UserError: see :func:`download`.
    """
    return download(name, None)
