"""Parts that families of diffusers components share: tokenization, latents and assembly."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fewstep.core.prompt_text import PromptWarning, prompt_name
from fewstep.core.types import Array, TextEncoder, UserError, Velocity
from fewstep.families.base import Architecture, Family
from fewstep.families.schedulers import of_scheduler

if TYPE_CHECKING:
    from torch.nn import Module


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int, words: int | None = None) -> Array:
    """Return token ids ``[B, length]``: longer prompts are cut, shorter ones padded.

    Args:
        tokenizer: of transformers.
        prompts: ``B`` texts.
        length: of a row.
        words: vocabulary size of the text encoder; the tokenizer may be another's.

    Raises:
        UserError: the tokenizer fails, or gives words that the encoder does not know.
    """
    try:
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
    except Exception as error:  # two libraries that trust what they read
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's tokenizer cannot read the prompt: {reason}") from error
    if words is not None and not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise UserError(
            f"the model's tokenizer gives the word {int(ids.max())}, its text encoder has {words}"
        )
    return ids


TOO_LONG = "too long"
READS = "reads the first"


@dataclass(frozen=True)
class Reader:
    """A tokenizer with the limits of its text encoder.

    Attributes:
        name: kind of the encoder, for messages.
        tokenizer: of transformers.
        length: tokens that the encoder reads, marks of beginning and end included.
        vocab_size: vocabulary size of the encoder; a tokenizer may have another.
    """

    name: str
    tokenizer: Any
    length: int
    vocab_size: int

    def __call__(self, prompts: Sequence[str]) -> Array:
        """Token ids ``[B, length]``.

        Raises:
            UserError: see :func:`tokenize`.
        """
        return tokenize(self.tokenizer, prompts, self.length, self.vocab_size)

    @property
    def room(self) -> int:
        """Most tokens of a prompt that are read."""
        return self.length - self.tokenizer.num_special_tokens_to_add()

    def count(self, prompt: str) -> int:
        """Return the tokens of a prompt, read or not."""
        if len(prompt.encode()) < self.room:  # no token is shorter than a byte
            return 0
        said = self.tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)
        return len(said.input_ids)


def warn_of_cuts(prompts: Sequence[str], readers: Sequence[Reader]) -> None:
    """Warn of each prompt that a text encoder cuts (:class:`fewstep.core.prompt_text.PromptWarning`).

    A prompt is cut where every encoder cuts it. Where one reads all of it, that is said as well.
    """
    for prompt in dict.fromkeys(prompts):
        counts = [(reader, reader.count(prompt)) for reader in readers]
        cut = [(reader, count) for reader, count in counts if count > reader.room]
        if not cut:
            continue
        reader, count = max(cut, key=lambda pair: pair[0].room / pair[1])
        what = prompt_name(prompt)
        message = f"{what} is {TOO_LONG}: {reader.room} of {count} tokens were kept"
        if whole := [other.name for other, many in counts if many <= other.room]:
            message = f"{reader.name} {READS} {reader.room} of {what}'s {count} tokens, {whole[-1]} all"
        warnings.warn(message, PromptWarning, stacklevel=3)


def append_mask(context: Array, mask: Array) -> Array:
    """Return a context ``[B, L, D + 1]`` that carries a token mask ``[B, L]`` as its last column.

    Whatever stores, caches or cuts a context then keeps its mask. A family's velocity takes the two apart
    with :func:`split_mask`.
    """
    import torch

    return torch.cat([context, mask.to(context.dtype)[..., None]], dim=-1)


def split_mask(context: Array) -> tuple[Array, Array]:
    """Return the context ``[B, L, D]`` and the boolean mask ``[B, L]`` of :func:`append_mask`."""
    return context[..., :-1], context[..., -1] > 0.5


@contextmanager
def cuts_known() -> Generator[None]:
    """Suppress warnings of cut prompts within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        yield


@contextmanager
def cuts_counted(total: int, what: str) -> Generator[None]:
    """Count cut prompts within the block, and warn once after it.

    Args:
        total: number of prompts.
        what: what they are called.
    """
    cut: list[str] = []
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> None:
            if category is PromptWarning and TOO_LONG in str(message):
                cut.append(str(message))
            elif category is not PromptWarning or READS not in str(message):
                plain(message, category, *more, **named)

        warnings.filterwarnings("always", category=PromptWarning)
        warnings.showwarning = show
        yield
    if cut:
        first = cut[0].partition(": ")[2]
        message = f"{len(cut)} of {total} {what} are longer than the text encoders read (the first: {first})"
        warnings.warn(message, PromptWarning, stacklevel=3)


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
    architecture: Architecture,
    device: str,
    name: str,
    velocity: Velocity,
    text: TextEncoder,
    latent: tuple[int, int, int],
    shift: float,
    steps: int,
    guidance: float | None,
    clip_length: int | None = None,
    embedded_guidance: float | None = None,
) -> Family:
    """Return a model of diffusers components.

    Args:
        parts: components by their diffusers names; the nets are moved, frozen and put into eval mode.
        architecture: the family.
        device: torch device.
        name: and those below: see :class:`fewstep.core.types.Model`.
        velocity: the adapter of ``parts["transformer"]``.
        text: the adapter of the text encoders.
        latent: default latent shape ``(C, H, W)``.
        shift: time shift.
        steps: default number of steps.
        guidance: default guidance scale, or ``None``.
        embedded_guidance: see :class:`fewstep.core.types.Model`.
        clip_length: see :class:`fewstep.families.base.Family`.
    """
    import torch

    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.to(device).requires_grad_(False).eval()
    vae = parts["vae"]
    schedule = of_scheduler(parts["scheduler"])
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
        embedded_guidance=embedded_guidance,
        sampler="renoise" if schedule.stochastic_sampling else "euler",
        from_numpy=lambda array: torch.from_numpy(array).to(device),
        to_numpy=lambda tensor: tensor.detach().float().cpu().numpy(),
        net=parts["transformer"],
        blocks=architecture.blocks(parts["transformer"]),
        parts={**parts, "scheduler": schedule.scheduler()},
        architecture=architecture,
        clip_length=clip_length,
    )


def with_renoise_sampler(family: Family) -> Family:
    """Return the same model with stochastic sampling, in its scheduler for diffusers as well."""
    schedule = replace(of_scheduler(family.parts["scheduler"]), stochastic_sampling=True)
    return replace(family, sampler="renoise", parts={**family.parts, "scheduler": schedule.scheduler()})


def offload_encoders(family: Family) -> None:
    """Move text encoders and codec to the CPU: training from encoded samples needs neither."""
    import torch

    for part in family.parts.values():
        if isinstance(part, torch.nn.Module) and part is not family.net:
            part.to("cpu")


@contextmanager
def on_device(family: Family, prefix: str = "text_encoder") -> Generator[None]:
    """Move the components with this name prefix to the net's device within the block, and back after it."""
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


def fingerprint(net: Module) -> str:
    """Return a hash of a net's weights, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
