"""Class-conditional DiT (Peebles and Xie, arXiv 2212.09748) as a rectified flow on pixels.

The net is diffusers' ``DiTTransformer2DModel``. There is no text encoder and no autoencoder: a prompt is the
name of a class, and latents are pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Array, Cond, UserError
from fewstep.families.base import Architecture, Family
from fewstep.families.net_classes import Layers, NetClass, Patch, Side, Width
from fewstep.families.schedulers import of_scheduler, schedule_shift

if TYPE_CHECKING:
    from torch.nn import Module

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""Ends of the names of the linear layers that a LoRA adapts: attention and MLP."""

MAX_CLASSES = 10_000


@dataclass(frozen=True)
class TransformerConfig:
    """The configuration of ``DiTTransformer2DModel``."""

    sample_size: Side
    patch_size: Patch
    in_channels: Width
    num_attention_heads: Width
    attention_head_dim: Width
    num_layers: Layers
    num_embeds_ada_norm: Width
    out_channels: Width | None = None


@dataclass(frozen=True)
class NetVelocity:
    """``DiTTransformer2DModel`` as a velocity. A context is the number of a class."""

    net: Any

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` float32 in [0, 1] -> ``[B, C, H, W]`` float32."""
        import torch

        v = self.net(
            hidden_states=x_t.to(self.net.dtype),
            timestep=1000 * t,  # stays float32: bf16 has no 749.25
            class_labels=cond.context[:, 0, 0].round().to(torch.int64),
            return_dict=False,
        )[0]
        return v.float()


@dataclass(frozen=True)
class ClassNames:
    """Names of classes to their numbers.

    Attributes:
        classes: the names, in the order of the net's classes.
        device: torch device of the conditions.
    """

    classes: tuple[str, ...]
    device: Any

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` names -> context ``[B, 1, 1]``, the numbers, and pooled ``[B, 0]``.

        The empty prompt is the class without a name that guidance compares with.

        Raises:
            UserError: a prompt names no class.
        """
        import torch

        numbers = [float(self._number(prompt)) for prompt in prompts]
        context = torch.tensor(numbers, device=self.device).reshape(-1, 1, 1)
        return Cond(context, context.new_zeros(len(numbers), 0))

    def _number(self, prompt: str) -> int:
        name = prompt.strip().lower()
        if not name:
            return len(self.classes)
        for number, known in enumerate(self.classes):
            if known.lower() == name:
                return number
        some = ", ".join(self.classes[:10]) + (", …" if len(self.classes) > 10 else "")
        raise UserError(f"this model draws classes, not prompts: {prompt[:40]!r} is none of {some}")


@dataclass(frozen=True)
class PixelCodec:
    """Pixels as latents: the same numbers, in as many channels as the net has.

    Attributes:
        channels: 3, or 1 for grey images.
    """

    channels: int

    def encode(self, images: Array) -> Array:
        """``[B, 3, h, w]`` in [-1, 1] -> ``[B, C, h, w]``; grey is the mean of the channels."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def decode(self, latents: Array) -> Array:
        """``[B, C, h, w]`` -> ``[B, 3, h, w]``."""
        return latents.expand(-1, 3, -1, -1) if self.channels == 1 else latents


class DiT(Architecture):
    """The family of class-conditional DiTs on pixels."""

    name = "dit"
    pipeline = "PixelDiTPipeline"
    nets = {"transformer": ("DiTTransformer2DModel",)}  # noqa: RUF012
    net_classes = {"DiTTransformer2DModel": NetClass("transformer", TransformerConfig)}  # noqa: RUF012
    required = ("transformer", "scheduler")
    modulation = None  # each block has an embedder of its own
    lora_targets = TARGETS

    def assemble(
        self,
        parts: Mapping[str, Any],
        *,
        name: str,
        steps: int | None = None,
        guidance: float | None = 2.0,
        side: int | None = None,
        device: str = "cpu",
        classes: Sequence[str] = (),
    ) -> Family:
        """Return a model made of components; see :meth:`fewstep.families.base.Architecture.assemble`.

        Args:
            parts: ``transformer`` and ``scheduler``.
            name: the model's name for the user.
            steps: default number of steps; by default 16.
            guidance: default guidance scale; ``None`` when guidance is distilled into the net.
            side: default side of an image in pixels; by default the net's ``sample_size``.
            device: torch device.
            classes: names of the classes; by default their numbers.

        Raises:
            UserError: the net predicts a variance, or there are more or fewer names than classes.
        """
        import torch

        net = parts["transformer"]
        config = net.config
        self._check(config, classes)
        if isinstance(net, torch.nn.Module):
            net.to(device).requires_grad_(False).eval()
            _keep_labels(net)
        width = side or config.sample_size
        schedule = of_scheduler(parts["scheduler"])
        names = tuple(classes) or tuple(str(number) for number in range(config.num_embeds_ada_norm))
        return Family(
            name=name,
            velocity=NetVelocity(net),
            text=ClassNames(names, torch.device(device)),
            codec=PixelCodec(config.in_channels),
            latent=(config.in_channels, width, width),
            downscale=1,
            shift=schedule_shift(schedule, (width // config.patch_size) ** 2),
            steps=steps or 16,
            guidance=guidance,
            sampler="renoise" if schedule.stochastic_sampling else "euler",
            from_numpy=lambda array: torch.from_numpy(array).to(device),
            to_numpy=lambda tensor: tensor.detach().float().cpu().numpy(),
            net=net,
            blocks=self.blocks(net),
            parts={**parts, "scheduler": schedule.scheduler()},
            architecture=self,
        )

    def _check(self, config: Any, classes: Sequence[str]) -> None:
        if config.out_channels not in (None, config.in_channels) or config.in_channels not in (1, 3):
            channels = f"{config.in_channels} channels to {config.out_channels}"
            raise UserError(f"a DiT on pixels takes 1 or 3 channels and gives as many, not {channels}")
        if classes and len(classes) != config.num_embeds_ada_norm:
            raise UserError(
                f"the net has {config.num_embeds_ada_norm} classes, but {len(classes)} names are given"
            )

    def student(self, teacher: Family, net: Module, name: str, steps: int) -> Family:
        """Return the teacher with another net, which takes ``steps`` steps and no second pass."""
        return self.assemble(
            {**teacher.parts, "transformer": net},
            name=name,
            steps=steps,
            guidance=None,
            side=teacher.latent[1],
            device=str(teacher.net.device),
            classes=_names(teacher),
        )

    def facts(self, family: Family) -> dict[str, object]:
        """Return what :meth:`save` writes into ``fewstep.json``, with the names of the classes."""
        return {**super().facts(family), "classes": list(_names(family))}

    def assemble_options(self, facts: Mapping[str, object]) -> dict[str, Any]:
        """Return the options of :meth:`assemble` that the facts of a model folder set.

        Raises:
            UserError: the names of the classes are no list of texts.
        """
        from typing import Annotated

        from msgspec import Meta

        from fewstep.core import json_io

        options = super().assemble_options(facts)
        if (classes := facts.get("classes")) is not None:
            names = tuple[Annotated[str, Meta(max_length=200)], ...]
            options["classes"] = json_io.convert(classes, names, "classes in fewstep.json")
        return options

    def pipeline_class(self) -> Any:
        """Return the pipeline class that writes model folders; diffusers has none without an autoencoder."""
        return _pipeline_class()

    def context_dim(self, config: Mapping[str, Any]) -> int:
        """Return 1: the number of the class."""
        return 1


def _names(family: Family) -> tuple[str, ...]:
    text: Any = family.text
    return text.classes


def _keep_labels(net: Module) -> None:
    """Turn off the net's own dropping of labels in training mode.

    Recipes drop labels, once per sample. The net would draw anew in each block, and in students, too.
    """
    for module in net.modules():
        if "dropout_prob" in vars(module):
            vars(module)["dropout_prob"] = 0.0


@cache
def _pipeline_class() -> Any:
    from diffusers import DiffusionPipeline

    class PixelDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
        """A DiT and its scheduler."""

        def __init__(self, transformer: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    return PixelDiTPipeline


ARCHITECTURE = DiT()
