"""A family of models, and a loaded model of one.

A family is one file with a subclass of :class:`Architecture` and one object of it, named ``ARCHITECTURE``.
``families/sd3.py`` and ``families/flux.py`` are the built-in ones.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.core.types import Model, UserError
from fewstep.families import diffusers_io
from fewstep.families.lora.original_names import DIFFUSERS, OriginalNames
from fewstep.families.net_classes import SHARED_CLASSES, NetClass

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


@dataclass(frozen=True, kw_only=True)
class Family(Model):
    """A loaded PyTorch model with its components, for training and export. No weight requires a gradient.

    Attributes:
        net: the torch module behind ``velocity``. Training unfreezes it, or a copy.
        blocks: its transformer blocks: where to shard, compile, checkpoint and take features.
        parts: the components by their diffusers names (``transformer``, ``vae``, ``text_encoder``, ...),
            ``None`` for one that is absent.
        architecture: the family.
        clip_length: number of rows of a context that come before those of an optional encoder (T5), which
            may be left out. ``None`` where no encoder is optional.
    """

    net: Any
    blocks: Sequence[Module]
    parts: Mapping[str, Any]
    architecture: Architecture
    clip_length: int | None = None

    @property
    def kind(self) -> str:
        """The name of the family, such as ``sd3``."""
        return self.architecture.name

    def student(self, net: Module, name: str, steps: int) -> Family:
        """Return the same model with another net of the same kind, which takes ``steps`` steps and no
        classifier-free guidance."""
        return self.architecture.student(self, net, name, steps)

    def without_t5(self) -> Family:
        """Return the same model without its optional encoder, or this one where it has none."""
        return self.architecture.without_optional(self) if self.clip_length is not None else self

    def save(self, folder: str | Path) -> None:
        """Write a diffusers folder (:meth:`Architecture.save`).

        Raises:
            UserError: something else is at that path, or the disk refuses.
        """
        self.architecture.save(self, folder)

    def with_guidance(self, guidance: float) -> Family:
        """Return the same model at another guidance scale: of its second pass, or the embedded one.

        Raises:
            UserError: guidance is distilled into the net, so it takes no scale.
        """
        if self.guidance is not None:
            return replace(self, guidance=guidance)
        if self.embedded_guidance is None:
            raise UserError(f"model {self.name} takes no guidance: guidance is distilled into it")
        velocity: Any = self.velocity
        return replace(self, velocity=velocity.with_guidance(guidance), embedded_guidance=guidance)


class Architecture(ABC):
    """All that the models of a family have in common.

    In methods, ``config`` is the configuration of the part ``transformer``. ``tokens`` maps each text encoder
    of the model to the number of tokens that it reads.

    Attributes:
        name: the family's name on the command line and in files.
        pipeline: the text-to-image pipeline class that ``model_index.json`` names.
        nets: part -> names of the classes that it can be.
        net_classes: name -> class of net, with the checked shape of its configuration.
        required: parts that a model folder must have.
        optional: parts that it may lack, together; at most one text encoder and its tokenizer.
        hidden_states: text encoders of which hidden states are read, not the last output.
        block_lists: attributes of the net that hold its transformer blocks, in order.
        modulation: the net's submodule that embeds time and pooled text. Layers that read its result alone
            are computed once per image. ``None`` where there is no such submodule.
        position_table: name of a learned table of positions that is cropped to the image size, or ``None``.
        lora_targets: ends of the names of the linear layers that a LoRA adapts.
        lora_names: names of layers in LoRA files of other programs; by default diffusers' names alone.
        single_files: whether :meth:`read_file` reads single-file checkpoints.
    """

    name: str
    pipeline: str
    nets: Mapping[str, tuple[str, ...]]
    net_classes: Mapping[str, NetClass] = SHARED_CLASSES
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    hidden_states: frozenset[str] = frozenset()
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    modulation: str | None = "time_text_embed"
    position_table: str | None = None
    lora_targets: tuple[str, ...]
    lora_names: OriginalNames = DIFFUSERS
    single_files: bool = False

    # --- models ---

    @abstractmethod
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
        """Return a model made of components.

        The nets are moved to ``device``, frozen and put into eval mode. The velocity is a dataclass with a
        field ``net``, and the text encoder a dataclass with a field ``parts``.

        Args:
            parts: components by their diffusers names. Nets may be stand-ins that have a ``config`` alone
                (:meth:`fewstep.families.spec.ModelSpec.stand_ins`).
            name: the model's name for the user.
            steps: default number of steps; by default the family's.
            guidance: default guidance scale.
            side: default side of an image in latent cells; by default the model's.
            device: torch device.
        """

    def load(
        self,
        source: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        t5: bool | None = None,
        name: str | None = None,
        config: str | Path | None = None,
    ) -> Family:
        """Load a model of this family.

        Args:
            source: a diffusers folder, a hub name (``owner/model``), or a single-file ``.safetensors``
                checkpoint where the family reads them.
            device: torch device, such as ``cpu`` or ``cuda``.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            t5: whether to load the optional text encoder; ``None`` loads it where it is present.
            name: name of the model; by default the one in the source.
            config: for a single file only: the diffusers folder or hub name with the configurations, the
                tokenizers and the text encoders that the file lacks; by default the hub's original.

        Raises:
            UserError: the source is missing, incomplete, broken or another family's, the hub cannot be
                reached, or the device or dtype is unknown.
        """
        if t5 is not None and not self.optional:
            raise UserError(f"model {source} always reads with T5: say neither --t5 nor --no-t5")
        torch_dtype = diffusers_io.torch_dtype(dtype)
        diffusers_io.check_device(device)
        path = Path(source)
        if path.is_file():
            parts, facts = self.read_file(path, config, torch_dtype, t5)
        else:
            folder = path if path.is_dir() else self.download(str(source), t5)
            parts = self.read_folder(folder, torch_dtype, t5)
            facts = diffusers_io.read_facts(folder)
        named = name or str(facts.get("name") or diffusers_io.name_of(path))
        return self.assemble(parts, name=named, device=device, **self.assemble_options(facts))

    def save(self, family: Family, folder: str | Path) -> None:
        """Write a diffusers folder that the family's pipeline of diffusers loads.

        The folder is written beside its destination and renamed. An earlier save there is replaced.

        Raises:
            UserError: something else is at that path, or the disk refuses.
        """
        diffusers_io.write_folder(family.parts, folder, self.pipeline_class(), self.facts(family))

    def student(self, teacher: Family, net: Module, name: str, steps: int) -> Family:
        """Return the teacher with another net, which takes ``steps`` steps and no second pass. Embedded
        guidance stays."""
        return self.assemble(
            {**teacher.parts, "transformer": net},
            name=name,
            steps=steps,
            guidance=teacher.embedded_guidance,
            side=teacher.latent[1],
            device=str(teacher.net.device),
        )

    def without_optional(self, family: Family) -> Family:
        """Return the same model without its optional parts."""
        return self.assemble(
            {**family.parts, **dict.fromkeys(self.optional)},
            name=family.name,
            steps=family.steps,
            guidance=family.embedded_guidance if family.guidance is None else family.guidance,
            side=family.latent[1],
            device=str(family.net.device),
        )

    def blocks(self, net: Module) -> list[Module]:
        """Return the net's transformer blocks, in order."""
        return [block for blocks in self.block_lists for block in getattr(net, blocks)]

    # --- files ---

    def pipeline_class(self) -> Any:
        """Return the pipeline class that writes model folders and downloads them."""
        return getattr(importlib.import_module("diffusers"), self.pipeline)

    def facts(self, family: Family) -> dict[str, object]:
        """Return what :meth:`save` writes into ``fewstep.json``."""
        return {"name": family.name, "steps": family.steps, "guidance": family.guidance}

    def assemble_options(self, facts: Mapping[str, object]) -> dict[str, Any]:
        """Return the options of :meth:`assemble` that the facts of a model folder set."""
        return {key: facts[key] for key in ("steps", "guidance") if key in facts}

    def read_file(
        self, path: Path, config: str | Path | None, dtype: torch.dtype, t5: bool | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the components of a single-file checkpoint and the facts in its header.

        Args:
            path: the file.
            config: and ``t5``: see :meth:`load`.
            dtype: torch dtype of the nets.
            t5: see :meth:`load`.

        Raises:
            UserError: the file is not such a checkpoint, or this family reads none.
        """
        raise UserError(
            f"{path} is a file; {self.name.upper()} is read from a diffusers folder or a hub name"
        )

    def read_index(self, folder: Path, required: Sequence[str] | None = None) -> dict[str, tuple[str, str]]:
        """Return ``{part: (library, class)}`` of a model folder.

        Args:
            folder: a folder in diffusers' layout.
            required: parts that must be present; by default the family's.

        Raises:
            UserError: see :func:`fewstep.families.diffusers_io.read_index`.
        """
        return diffusers_io.read_index(folder, self, self.required if required is None else required)

    def read_folder(self, folder: Path, dtype: torch.dtype, t5: bool | None = None) -> dict[str, Any]:
        """Return the components of a diffusers folder, nets in the torch ``dtype``.

        Raises:
            UserError: see :meth:`load`.
        """
        index = self.read_index(folder, (*self.required, *(self.optional if t5 else ())))
        absent = t5 is False or any(part not in index for part in self.optional)
        wanted = self.required if absent else (*self.required, *self.optional)
        return diffusers_io.read_parts(folder, index, wanted, self, dtype)

    def download(self, name: str, t5: bool | None = None) -> Path:
        """Return the folder of a hub model, from the hub or its cache.

        Raises:
            UserError: the name is neither a path nor a hub name, or the hub cannot be reached.
        """
        without = dict.fromkeys(self.optional) if t5 is False else {}
        return diffusers_io.fetch(name, self.pipeline_class(), without)

    # --- shapes by configuration ---

    def patch(self, config: Mapping[str, Any]) -> int:
        """Return the latent cells along a side of a token."""
        return int(config["patch_size"])

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return the channels of a latent."""
        return int(config["in_channels"])

    def side(self, config: Mapping[str, Any]) -> int:
        """Return the default side of an image, in latent cells."""
        return int(config["sample_size"])

    def max_patches(self, config: Mapping[str, Any]) -> int:
        """Return the most tokens along a side of an image."""
        return 512

    def context_dim(self, config: Mapping[str, Any]) -> int:
        """Return the width ``D`` of a context ``[B, L, D]``."""
        return int(config["joint_attention_dim"])

    def pooled_dim(self, config: Mapping[str, Any]) -> int:
        """Return the width ``P`` of the pooled text ``[B, P]``; 0 for a net without."""
        return int(config.get("pooled_projection_dim") or 0)

    def t5_length(self, config: Mapping[str, Any]) -> int:
        """Return the most tokens that a text encoder without a table of positions reads."""
        return 512

    def context_length(self, tokens: Mapping[str, int]) -> int:
        """Return the rows ``L`` of a context."""
        return sum(tokens.values())

    def few_blocks(self, config: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return the configuration with at most ``count`` blocks of each kind, to measure memory with."""
        counts = {
            key: min(int(config[key]), count) for key in ("num_layers", "num_single_layers") if key in config
        }
        return {**config, **counts}
