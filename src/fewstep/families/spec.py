"""What configurations say of a model: its parts without their weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fewstep.core.types import UserError
from fewstep.families.config_check import check_config, with_defaults
from fewstep.families.diffusers_io import read_index, read_json, read_part
from fewstep.families.safetensors_reader import Weights, refuse_quantized

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NETS = ("transformer", "vae", *ENCODERS)
"""The parts that have weights."""


@dataclass(frozen=True)
class ModelSpec:
    """A model's parts by their diffusers names.

    Attributes:
        kind: name of its family's module.
        classes: (library, class) of each net.
        configs: configuration of each net.
        others: tokenizers and the scheduler; empty where nobody will draw.
        folder: where the weights lie; ``None`` where there are none.
        max_tokens: tokens that each text encoder reads.
        stored: bytes of a number of each part, as its file has it; 2 where nobody knows.
        places: folders of parts that lie elsewhere.
    """

    kind: str
    classes: Mapping[str, tuple[str, str]]
    configs: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Path | None = None
    max_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])

    @property
    def encoders(self) -> list[str]:
        """The text encoders that are there."""
        return [part for part in ENCODERS if part in self.configs]

    @property
    def t5(self) -> str | None:
        """The part that is T5, if any."""
        found = [part for part in self.encoders if self.classes[part][1].startswith("T5")]
        return found[0] if found else None

    @property
    def patch(self) -> int:
        """Latents along a side of a token."""
        return 2 if self.kind == "flux" else int(self.configs["transformer"]["patch_size"])

    @property
    def downscale(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    def without(self, part: str) -> ModelSpec:
        """The same without an encoder and its tokenizer."""
        names = (part, part.replace("text_encoder", "tokenizer"))
        left = (
            {k: v for k, v in parts.items() if k not in names}
            for parts in (self.classes, self.configs, self.others)
        )
        classes, configs, others = left
        return replace(self, classes=classes, configs=configs, others=others)

    @property
    def decoder(self) -> str:
        """The part that decodes: a tiny autoencoder where there is one."""
        return "decoder" if "decoder" in self.configs else "vae"

    def pos_embed_crop(self, latents: tuple[int, int]) -> int:
        """Positions along a side of SD3's table that a picture needs: an even number fewer than there are, so
        that what is cut out of their middle is what would be cut out of the whole table's."""
        most = int(self.configs["transformer"]["pos_embed_max_size"])
        side = max(latents) // self.patch
        return min(side + (most - side) % 2, most)

    def place(self, part: str) -> Path:
        """The folder of a part's weights."""
        assert self.folder is not None
        return self.places.get(part, self.folder / part)

    def parts(self) -> dict[str, Any]:
        """What a family's ``assemble`` asks of parts, without any weights."""
        return {part: config_stub(config) for part, config in self.configs.items()} | dict(self.others)


def config_stub(config: Mapping[str, Any]) -> Any:
    """A net's configuration in the net's place."""
    told = {"shift_factor": None, "scaling_factor": 1.0, "guidance_embeds": False, **config}
    return SimpleNamespace(
        config=SimpleNamespace(**told), transformer_blocks=(), single_transformer_blocks=()
    )


def read(folder: Path, kind: str) -> ModelSpec:
    """The outline of a diffusers folder, whose weights need not be there.

    Args:
        folder: the folder.
        kind: name of the family's module.

    Raises:
        UserError: the folder is another family's, incomplete or broken.
    """
    module = importlib.import_module(f"fewstep.families.base.{kind}")
    index = read_index(folder, module.PIPELINE, module.REQUIRED)
    optional = [part for part in ("text_encoder_3", "tokenizer_3") if part not in module.REQUIRED]
    wanted = [*module.REQUIRED, *(optional if all(part in index for part in optional) else ())]
    nets = [part for part in wanted if part in NETS]
    others = {part: read_part(folder, part, index[part]) for part in wanted if part not in NETS}
    configs = {part: read_config(folder / part, index[part][1]) for part in nets}
    outline = ModelSpec(kind, {part: index[part] for part in nets}, configs, others, folder)
    try:
        words = {part: _words(outline, part) for part in outline.encoders}
        assert outline.downscale and outline.patch
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a configuration lacks {error}; give a whole diffusers folder") from None
    there = [part for part in nets if any((folder / part).glob("*.safetensors"))]
    return replace(outline, max_tokens=words, stored={part: _stored(folder / part) for part in there})


def read_config(folder: Path, name: str | None = None) -> dict[str, Any]:
    """A net's configuration.

    Args:
        folder: of the net.
        name: of its class; what the configuration says where ``None``.

    Raises:
        UserError: it is not there, no JSON object, of another shape than its class reads, or of weights that
            are quantized already.
    """
    told = read_json(folder / "config.json")
    name = name or str(told.get("_class_name"))
    check_config(told, name, str(folder / "config.json"))
    config = {k: v for k, v in with_defaults(told, name).items() if not k.startswith("_")}
    refuse_quantized(config, folder)
    return config


def with_tiny_decoder(outline: ModelSpec, folder: Path) -> ModelSpec:
    """The outline with a tiny autoencoder as its part ``decoder``.

    Raises:
        UserError: the folder holds none, or one of other latents.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--tiny-decoder {folder} is no folder with the config.json of a tiny autoencoder")
    config = read_config(folder)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != "AutoencoderTiny":
        raise UserError(f"--tiny-decoder {folder} holds a {kind}, but an AutoencoderTiny is needed")
    mine, its = outline.configs["vae"].get("latent_channels", 4), config.get("latent_channels", 4)
    if mine != its:
        raise UserError(f"--tiny-decoder {folder} reads latents of {its} channels, the model has {mine}")
    return replace(
        outline,
        classes={**outline.classes, "decoder": ("diffusers", "AutoencoderTiny")},
        configs={**outline.configs, "decoder": config},
        stored={**outline.stored, "decoder": _stored(folder)},
        places={**outline.places, "decoder": folder},
    )


def _words(outline: ModelSpec, part: str) -> int:
    tokenizer = outline.others[part.replace("text_encoder", "tokenizer")]
    most = outline.configs[part].get("max_position_embeddings")
    if most is None:  # T5 has no positions of its own
        most = 512 if outline.configs["transformer"].get("guidance_embeds") else 256
    return min(int(most), int(tokenizer.model_max_length))


def _stored(folder: Path) -> int:
    return Weights.open(folder).stored


def _clip(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 77,
        "hidden_act": act, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


CLIP = ("transformers", "CLIPTextModelWithProjection")
SD35_MEDIUM = ModelSpec(
    # stabilityai/stable-diffusion-3.5-medium, the config.json of each part
    kind="sd3",
    classes={
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
        "text_encoder_3": ("transformers", "T5EncoderModel"),
    },
    configs={
        "transformer": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
            "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        "vae": {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
            "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
        "text_encoder": _clip(768, 12, 12, "quick_gelu"),
        "text_encoder_2": _clip(1280, 32, 20, "gelu"),
        "text_encoder_3": {
            "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
            "num_heads": 64, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1,
        },
    },
    max_tokens={"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256},
)  # fmt: skip
"""Stable Diffusion 3.5 Medium, for questions of memory without a folder."""
