"""What the families of diffusers components share (floor 2): tokens, pixels, and the family itself."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fewstep.families import Family
from fewstep.types import Array, TextEncoder, UserError, Velocity


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, words: int | None = None) -> Array:
    """Token ids ``[B, length]``: longer prompts cut, shorter ones padded.

    Args:
        tokenizer: of transformers.
        prompts: ``B`` texts.
        length: of a row.
        words: that the text encoder knows, where the two come from a stranger.

    Raises:
        UserError: the tokenizer fails, or gives words that the encoder does not know.
    """
    try:
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
    except Exception as error:  # of two libraries that believe what they read
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's tokenizer cannot read the prompt: {reason}") from error
    if words is not None and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise UserError(
            f"the model's tokenizer gives the word {int(ids.max())}, its text encoder has {words}"
        )
    return ids


@dataclass(frozen=True)
class LatentCodec:
    """``AutoencoderKL`` or ``AutoencoderTiny`` with the scaling of latents."""

    vae: Any

    def encode(self, images: Array) -> Array:
        """``[B, 3, h, w]`` in [-1, 1] -> the mode of the posterior, scaled, ``[B, C, H, W]`` float32."""
        out = self.vae.encode(images.to(self.vae.dtype))
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        config = self.vae.config
        return (latents.float() - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Array) -> Array:
        """``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1], float32."""
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float()


def family_of_parts(
    parts: Mapping[str, Any],
    *,
    kind: str,
    device: str,
    name: str,
    velocity: Velocity,
    text: TextEncoder,
    latent: tuple[int, int, int],
    shift: float,
    steps: int,
    guidance: float | None,
    blocks: Sequence[Any],
    clip_length: int | None = None,
    told: float | None = None,
) -> Family:
    """A family of diffusers components: what each family says of itself, and what follows from the parts.

    Args:
        parts: components by their diffusers names; the nets are moved, frozen and put into eval mode.
        kind: name of the family's module.
        device: torch device.
        name: and those below: see :class:`fewstep.types.Model`.
        velocity: the adapter of ``parts["transformer"]``.
        text: the adapter of the text encoders.
        latent: default latent shape ``(C, H, W)``.
        shift: time shift.
        steps: default number of steps.
        guidance: default guidance scale, or ``None``.
        blocks: and those below: see :class:`fewstep.families.Family`.
    """
    import torch

    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).requires_grad_(False).eval()
    vae = parts["vae"]
    return Family(
        name=name,
        velocity=velocity,
        text=text,
        codec=LatentCodec(vae),
        latent=latent,
        downscale=2 ** (len(vae.config.block_out_channels) - 1),
        shift=shift,
        steps=steps,
        guidance=guidance,
        sampler="renoise" if parts["scheduler"].config.get("stochastic_sampling") else "euler",
        lift=lambda array: torch.from_numpy(array).to(device),
        lower=lambda tensor: tensor.detach().float().cpu().numpy(),
        net=parts["transformer"],
        blocks=blocks,
        parts=parts,
        kind=kind,
        clip_length=clip_length,
        told=told,
    )


def renoising(family: Family) -> Family:
    """The same model, its steps taken with fresh noise: its scheduler says so, to stock diffusers as well."""
    scheduler = family.parts["scheduler"]
    told = type(scheduler).from_config(scheduler.config, stochastic_sampling=True)
    return replace(family, sampler="renoise", parts={**family.parts, "scheduler": told})


def aside(family: Family) -> None:
    """Move text encoders and codec to the CPU: training from encoded samples needs neither."""
    import torch

    for part in family.parts.values():
        if isinstance(part, torch.nn.Module) and part is not family.net:
            part.to("cpu")


@contextmanager
def at_hand(family: Family, prefix: str = "text_encoder") -> Generator[None]:
    """Within the block the components whose names begin like this are where the net is; afterwards they are
    where they were."""
    import torch

    place = family.net.device
    away = [
        part
        for name, part in family.parts.items()
        if isinstance(part, torch.nn.Module) and part is not family.net and name.startswith(prefix)
        and any(p.device != place for p in part.parameters())
    ]  # fmt: skip
    for part in away:
        part.to(place)
    try:
        yield
    finally:
        for part in away:
            part.to("cpu")
