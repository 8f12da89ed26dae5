"""Distillations without weights and samples, for ``fewstep estimate-memory``.

A family is built from its configuration alone, so that the recipes themselves run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import Batch, Cond, UserError
from fewstep.data.teacher_samples.manifest import Plan
from fewstep.data.teacher_samples.read import TeacherSamples
from fewstep.distill.config import DistillConfig
from fewstep.distill.context import DistillContext
from fewstep.distill.setup import build_context, make_adapters
from fewstep.families.base import Family, family_of

PATCH = 2
"""Latents along a side of a token, in both families."""


@dataclass(frozen=True)
class NetSpec:
    """The configuration of a model that its memory depends on.

    Attributes:
        name: what the user calls it.
        kind: name of its family's module.
        net: the transformer's configuration.
        clip: rows of a context before T5's; 0 where T5 must stay.
        t5: rows of T5.
        guidance: the teacher's scale.
        side: pixels along a side, by default.
        downscale: pixels per latent cell along a side.
        beside: parameters of the parts that training with ``fewstep sample-teacher``'s samples needs for
            contact sheets and scores alone, by name.
    """

    name: str
    kind: str
    net: Mapping[str, Any]
    clip: int
    t5: int
    guidance: float
    side: int = 1024
    downscale: int = 8
    beside: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def latents(self) -> int:
        """Channels of a latent."""
        channels = int(self.net["in_channels"])
        return channels // PATCH**2 if self.kind == "flux" else channels


PRESETS = {
    "sd3.5-medium": NetSpec(
        "sd3.5-medium",
        "sd3",
        # stabilityai/stable-diffusion-3.5-medium, transformer/config.json
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
            "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        clip=77,
        t5=256,
        guidance=4.5,
        beside={"CLIP-L": 123_650_304, "CLIP-G": 694_659_840, "T5": 4_762_310_656, "codec": 83_819_683},
    ),
    "flux-dev": NetSpec(
        "flux-dev",
        "flux",
        # black-forest-labs/FLUX.1-dev, transformer/config.json
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
            "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        clip=0,
        t5=512,
        guidance=3.5,
        beside={"CLIP-L": 123_060_480, "T5": 4_762_310_656, "codec": 83_819_683},
    ),
}  # fmt: skip


def read_spec(model: str) -> NetSpec:
    """A preset's shape, or that of a diffusers folder, whose weights need not be there.

    Raises:
        UserError: it is neither, or the folder's configurations are missing or broken.
    """
    if model in PRESETS:
        return PRESETS[model]
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"--model {model}: neither a folder nor one of {', '.join(PRESETS)}")
    from fewstep.families.diffusers_io import has_part
    from fewstep.families.spec import read_config

    kind = family_of(folder).__name__.rpartition(".")[2]
    net = read_config(folder / "transformer")

    def there(part: str) -> bool:
        return has_part(folder, part)

    try:
        rows = _clip_rows(folder)
        vae = read_config(folder / "vae")
        width = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        downscale = 2 ** (len(width) - 1)
        if kind == "flux":
            clip, t5, guidance, side = 0, 512 if net.get("guidance_embeds") else 256, 3.5, 128
        else:
            clip, t5, guidance = rows, 256 if there("text_encoder_3") else 0, 4.5
            side = int(net["sample_size"])
        beside = {
            part: sum(file.stat().st_size // 2 for file in (folder / part).glob("*.safetensors"))
            for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
            if there(part)
        }
        t5 = min(t5, rows) if t5 and _short(folder, kind) else t5
        return NetSpec(folder.name, kind, net, clip, t5, guidance, side * downscale, downscale, beside)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a configuration lacks {error}; give a whole diffusers folder") from error


def _clip_rows(folder: Path) -> int:
    from fewstep.families.spec import read_config

    return int(read_config(folder / "text_encoder", "CLIPTextModel").get("max_position_embeddings", 77))


def _short(folder: Path, kind: str) -> bool:
    """Whether T5's tokenizer was made for fewer tokens than diffusers asks for."""
    from fewstep.families.config_check import longest_prompt

    part = folder / ("tokenizer_2" if kind == "flux" else "tokenizer_3")
    return longest_prompt(part) <= _clip_rows(folder)


def fake_net(shape: NetSpec, dtype: str, device: str = "cpu") -> Any:
    """The transformer, its weights whatever they are, frozen."""
    import diffusers
    import torch

    from fewstep.modules.memory_tracker import cast_parameters

    classes = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
    try:
        with torch.device(device):
            net = getattr(diffusers, classes[shape.kind])(**shape.net)
    except (TypeError, ValueError) as error:
        raise UserError(f"{shape.name}: transformer/config.json makes no net ({error})") from error
    return cast_parameters(net, getattr(torch, dtype)).eval()


@dataclass(frozen=True, kw_only=True)
class NetOnlyFamily(Family):
    """A family that is a net alone: no text encoders, no codec."""

    def student(self, net: Any, name: str, steps: int) -> Family:
        from fewstep.modules.memory_tracker import cast_parameters

        velocity: Any = self.velocity
        net = cast_parameters(net)
        return replace(self, net=net, velocity=replace(velocity, net=net), blocks=blocks_of(net))


def blocks_of(net: Any) -> list[Any]:
    """A transformer's blocks, in their order."""
    return [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]


class FakeSamples(TeacherSamples):
    """Samples that hold nothing but their shapes."""

    def read(self, rows: Sequence[int]) -> Batch:
        import torch

        states, context, pooled = (
            torch.zeros(len(rows), *self.plan.shape(kind)) for kind in ("states", "context", "pooled")
        )
        return Batch(states[:, -1], Cond(context, pooled), [""] * len(rows), states)


@dataclass(frozen=True)
class FakeSetup(DistillConfig):
    """The options of a distillation whose teacher and samples have shapes and no content.

    Attributes:
        shape: of the teacher.
        side: pixels along a side of an image.
    """

    shape: NetSpec = PRESETS["sd3.5-medium"]
    side: int = 1024


@build_context.register(FakeSetup)
def build_fake_context(
    config: FakeSetup,
    name: str,
    *,
    trajectories: bool = False,
    split: bool = False,
    folder: Path | None = None,
) -> DistillContext:
    """Build the context of a distillation without weights and without samples."""
    import torch

    shape, family = config.shape, _family(config)
    plan = Plan(
        teacher=shape.name, weights="", text="", dtype=config.dtype, t5=shape.t5 > 0,
        guidance=shape.guidance, steps=config.student_steps, student_steps=config.student_steps,
        shift=family.shift, seed=0, number=max(config.batch_size, 2), captions="", per_shard=1,
        pictures=False,
        latent=family.latent, context=(shape.clip + shape.t5, int(shape.net["joint_attention_dim"])),
        pooled=int(shape.net["pooled_projection_dim"]), clip_length=shape.clip or None,
    )  # fmt: skip
    null = Cond(torch.zeros(1, *plan.context), torch.zeros(1, plan.pooled))
    samples = FakeSamples(Path(), plan, [""] * plan.number, null, np.zeros((0, 3), np.int64))
    adapters = make_adapters(replace(config, init=None), family, split) if config.lora else None
    return DistillContext(
        config, name, folder or Path(name), family, samples, family, type(family.net), adapters
    )


def _family(config: FakeSetup) -> Family:
    import importlib

    shape = config.shape
    module = importlib.import_module(f"fewstep.families.{shape.kind}")
    net = fake_net(shape, config.dtype, config.device)
    embedded = shape.guidance if getattr(net.config, "guidance_embeds", False) else None
    side = config.side // shape.downscale
    nothing: Any = None
    return NetOnlyFamily(
        name=shape.name,
        velocity=module.NetVelocity(net),
        text=nothing,
        codec=nothing,
        latent=(shape.latents, side, side),
        downscale=shape.downscale,
        shift=3.0,
        steps=28,
        guidance=None if shape.kind == "flux" else shape.guidance,
        net=net,
        blocks=blocks_of(net),
        parts={},
        kind=shape.kind,
        clip_length=shape.clip or None,
        embedded_guidance=embedded,
    )
