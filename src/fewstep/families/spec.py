"""A model by its configurations, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fewstep.core.types import UserError
from fewstep.families.base import Architecture
from fewstep.families.config_check import check_config, tokenizer_max_length, with_defaults
from fewstep.families.diffusers_io import name_of, read_json, read_part
from fewstep.families.net_classes import SHARED_CLASSES, NetClass
from fewstep.families.safetensors_reader import refuse_quantized
from fewstep.families.safetensors_weights import Weights
from fewstep.families.schedulers import Schedule

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NETS = ("transformer", "vae", *ENCODERS)
"""The parts that have weights."""


@dataclass(frozen=True)
class ModelSpec:
    """A model's components by their diffusers names, without weights.

    Attributes:
        name: the model's name.
        architecture: its family.
        classes: part -> (library, class) of each net.
        configs: part -> configuration of each net.
        others: tokenizers and the scheduler; empty where no image will be made.
        folder: where the weights are; ``None`` where there are none.
        max_tokens: text encoder -> tokens that it reads.
        stored: part -> bytes of a number in its files; 2 for a part that is not in it.
        places: part -> its folder, where that is not in ``folder``.
    """

    name: str
    architecture: Architecture
    classes: Mapping[str, tuple[str, str]]
    configs: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folder: Path | None = None
    max_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])

    @property
    def net(self) -> Mapping[str, Any]:
        """The configuration of the transformer."""
        return self.configs["transformer"]

    @property
    def encoders(self) -> list[str]:
        """The text encoders that the model has."""
        return [part for part in ENCODERS if part in self.configs]

    @property
    def t5(self) -> str | None:
        """The part that is a T5, if any."""
        found = [part for part in self.encoders if self.classes[part][1].startswith("T5")]
        return found[0] if found else None

    @property
    def patch(self) -> int:
        """Latent cells along a side of a token."""
        return self.architecture.patch(self.net)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along a side."""
        vae = self.configs["vae"]
        return 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)

    @property
    def side(self) -> int:
        """Default side of an image, in pixels."""
        return self.architecture.side(self.net) * self.downscale

    @property
    def max_side(self) -> int:
        """Largest side of an image, in pixels."""
        return self.architecture.max_patches(self.net) * self.patch * self.downscale

    @property
    def context_shape(self) -> tuple[int, int]:
        """Shape ``(L, D)`` of the context of a prompt."""
        tokens = {part: self.max_tokens[part] for part in self.encoders}
        return self.architecture.context_length(tokens), self.architecture.context_dim(self.net)

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text."""
        return self.architecture.pooled_dim(self.net)

    @property
    def decoder(self) -> str:
        """The part that decodes: a tiny autoencoder where there is one."""
        return "decoder" if "decoder" in self.configs else "vae"

    def without(self, part: str) -> ModelSpec:
        """Return the same model without a text encoder and its tokenizer."""
        names = (part, part.replace("text_encoder", "tokenizer"))
        left = (
            {k: v for k, v in parts.items() if k not in names}
            for parts in (self.classes, self.configs, self.others)
        )
        classes, configs, others = left
        return replace(self, classes=classes, configs=configs, others=others)

    def pos_embed_crop(self, latents: tuple[int, int]) -> int:
        """Return the side of the crop of the table of positions that an image needs.

        The crop has an even number of positions less than the table along a side. The net then cuts the same
        positions out of its middle as out of the whole table.
        """
        size = self.architecture.max_patches(self.net)
        side = max(latents) // self.patch
        return min(side + (size - side) % 2, size)

    def place(self, part: str) -> Path:
        """Return the folder of a part's weights."""
        assert self.folder is not None
        return self.places.get(part, self.folder / part)

    def stand_ins(self) -> dict[str, Any]:
        """Return components without weights: each net is replaced by an object that has its ``config``.

        :meth:`fewstep.families.base.Architecture.assemble` takes them.
        """
        lists = self.architecture.block_lists
        nets = {part: config_stand_in(config, lists) for part, config in self.configs.items()}
        tokenizers = {
            part.replace("text_encoder", "tokenizer"): SimpleNamespace(model_max_length=length)
            for part, length in self.max_tokens.items()
        }
        others = dict(self.others) or {"scheduler": Schedule(shift=3.0).scheduler(), **tokenizers}
        return nets | others


def config_stand_in(config: Mapping[str, object], block_lists: tuple[str, ...] = ()) -> SimpleNamespace:
    """Return an object with a net's ``config`` and no blocks."""
    values = {"shift_factor": None, "scaling_factor": 1.0, "guidance_embeds": False, **config}
    return SimpleNamespace(config=SimpleNamespace(**values), **dict.fromkeys(block_lists, ()))


def read(folder: Path, architecture: Architecture, *, tokenizers: bool = True) -> ModelSpec:
    """Return the spec of a diffusers folder. The weights need not be there.

    Args:
        folder: the folder.
        architecture: its family.
        tokenizers: whether to load the tokenizers and the scheduler.

    Raises:
        UserError: the folder is another family's, incomplete or broken.
    """
    index = architecture.read_index(folder)
    whole = all(part in index for part in architecture.optional)
    wanted = [*architecture.required, *(architecture.optional if whole else ())]
    nets = [part for part in wanted if part in NETS]
    others: dict[str, Any] = {}
    if tokenizers:
        others = {
            part: read_part(folder, part, index[part], architecture) for part in wanted if part not in NETS
        }
    classes = architecture.net_classes
    configs = {part: read_config(folder / part, index[part][1], classes) for part in nets}
    name = name_of(folder)
    spec = ModelSpec(name, architecture, {part: index[part] for part in nets}, configs, others, folder)
    try:
        tokens = {part: _max_tokens(spec, part) for part in spec.encoders}
        assert spec.downscale and spec.patch and spec.side
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a configuration lacks {error}; give a whole diffusers folder") from None
    there = [part for part in nets if any((folder / part).glob("*.safetensors"))]
    return replace(spec, max_tokens=tokens, stored={part: _stored(folder / part) for part in there})


def read_config(
    folder: Path, name: str | None = None, classes: Mapping[str, NetClass] = SHARED_CLASSES
) -> dict[str, Any]:
    """Return a net's configuration.

    Args:
        folder: folder of the net.
        name: name of its class; ``None`` takes what the configuration says.
        classes: name -> class of net.

    Raises:
        UserError: the file is missing, not a JSON object or not valid for its class, or the weights are
            quantized already.
    """
    found = read_json(folder / "config.json")
    name = name or str(found.get("_class_name"))
    check_config(found, name, str(folder / "config.json"), classes)
    config = {k: v for k, v in with_defaults(found, name, classes).items() if not k.startswith("_")}
    refuse_quantized(config, folder)
    return config


def with_tiny_decoder(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return the spec with a tiny autoencoder as its part ``decoder``.

    Raises:
        UserError: the folder holds none, or one for other latents.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--tiny-decoder {folder} is no folder with the config.json of a tiny autoencoder")
    config = read_config(folder)
    name = read_json(folder / "config.json").get("_class_name")
    if name != "AutoencoderTiny":
        raise UserError(f"--tiny-decoder {folder} holds a {name}, but an AutoencoderTiny is needed")
    channels, its = spec.configs["vae"].get("latent_channels", 4), config.get("latent_channels", 4)
    if channels != its:
        raise UserError(f"--tiny-decoder {folder} reads latents of {its} channels, the model has {channels}")
    return replace(
        spec,
        classes={**spec.classes, "decoder": ("diffusers", "AutoencoderTiny")},
        configs={**spec.configs, "decoder": config},
        stored={**spec.stored, "decoder": _stored(folder)},
        places={**spec.places, "decoder": folder},
    )


def _max_tokens(spec: ModelSpec, part: str) -> int:
    name = part.replace("text_encoder", "tokenizer")
    if name in spec.others:
        limit = spec.others[name].model_max_length
    else:
        assert spec.folder is not None
        limit = tokenizer_max_length(spec.folder / name)
    size = spec.configs[part].get("max_position_embeddings")
    return min(int(spec.architecture.t5_length(spec.net) if size is None else size), int(limit))


def _stored(folder: Path) -> int:
    return Weights.open(folder).stored
