"""Assembly of a model from its parts according to a memory plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fewstep.core.types import Model
from fewstep.families.base import Family
from fewstep.families.lora.layers import Updates
from fewstep.families.safetensors_weights import Weights
from fewstep.families.spec import ModelSpec
from fewstep.inference.compile import compile_blocks, compile_decoder, compile_encoder
from fewstep.inference.cuda_graphs import CUDAGraphCache
from fewstep.inference.materialize import WeightLoader
from fewstep.inference.memory_plan import ExecutionConfig, Plan, PlanConstraints
from fewstep.inference.meta_init import init_on_meta
from fewstep.inference.offload import OffloadedModule, OffloadManager, PinnedBuffer
from fewstep.inference.offloaded import Codec, OffloadedVelocity
from fewstep.inference.prompt_cache import CachedTextEncoder, UnbatchedEncoder
from fewstep.inference.quantize import quantizable
from fewstep.inference.sampling_config import shift_for_size
from fewstep.inference.student_weights import PartUpdates, Student, updates_of
from fewstep.modules.adaln import split_modulation

OpenWeights = Callable[[ModelSpec, str], Weights]
"""Opens the weights of a part, given the spec and the part's name."""


def on_disk(spec: ModelSpec, part: str) -> Weights:
    """Open the weights of a part in its folder."""
    return Weights.open(spec.place(part))


@dataclass(frozen=True)
class ModelBuilder:
    """Builds a model from its parts.

    Attributes:
        spec: the model's parts and configurations.
        family: its family, with placeholders for the nets.
        constraints: device and workload of the plan.
        plan: the memory plan.
        student: a student of the model, if any.
        device: the device.
        open_weights: opens the weights of a part.
        compile: whether to compile the net's blocks, text encoders and decoder.
        loras: updates of LoRAs by part.
    """

    spec: ModelSpec
    family: Family
    constraints: PlanConstraints
    plan: Plan
    student: Student | None
    device: str
    open_weights: OpenWeights
    compile: bool
    loras: PartUpdates = field(default_factory=dict[str, Updates])

    @property
    def config(self) -> ExecutionConfig:
        """The configuration of the plan."""
        return self.plan.config

    @property
    def native(self) -> torch.dtype:
        """The data type of the device's arithmetic."""
        return torch.float32 if self.constraints.native == 32 else torch.bfloat16

    def model(self) -> Model:
        """Return the model with its resident parts loaded.

        Raises:
            UserError: weights are missing, or have other shapes than the configuration.
        """
        spec, family, (height, width) = self.spec, self.family, self.constraints.latents
        net, source = self._net()
        paths = {id(layer): f"{path}." for path, layer in net.named_modules()}
        modulation, body = split_modulation(net, spec.architecture.modulation)
        if self.compile:
            compile_blocks(body)
        modulation_layers = (modulation.embedder, *modulation.layers) if modulation.layers else ()
        host_buffer = PinnedBuffer()
        offloaded = (
            0 if self.config.residency == "all" else len(modulation_layers) - self.plan.resident_layers
        )
        layers = {
            id(layer): OffloadedModule(
                layer, source, host_buffer, paths[id(layer)], stays_loaded=index >= offloaded
            )
            for index, layer in enumerate(modulation_layers)
        }
        others = {part: self._part(part, host_buffer) for part in spec.configs if part != "transformer"}
        manager = OffloadManager(
            {"transformer": OffloadedModule(body, source, host_buffer), **others}, self._resident_parts()
        )
        for layer in layers.values():
            if layer.stays_loaded:
                layer.load()
        manager.load_resident()
        velocity: Any = family.velocity
        text: Any = family.text
        graph_cache = CUDAGraphCache() if self.compile and self.device != "cpu" else None
        graphs = {part: graph_cache if part in manager.resident_parts else None for part in manager.parts}
        encoders = {part: UnbatchedEncoder(manager, part, graphs[part]) for part in spec.encoders}
        codec = Codec(manager, spec.decoder, self.config.tiles, self.constraints.latents, spec.downscale)
        return Model(
            name=family.name,
            velocity=OffloadedVelocity(
                manager, replace(velocity, net=body), modulation, layers, graphs["transformer"]
            ),
            text=CachedTextEncoder(replace(text, parts={**text.parts, **encoders}), self.device, self.native),
            codec=replace(codec, meanwhile=self._spare_layers(layers.values())),
            latent=(family.latent[0], height, width),
            downscale=spec.downscale,
            shift=shift_for_size(spec, family, self.constraints.latents),
            steps=family.steps,
            guidance=family.guidance,
            embedded_guidance=family.embedded_guidance,
            sampler=family.sampler,
            from_numpy=lambda array: torch.from_numpy(array).to(self.device),
            to_numpy=lambda tensor: tensor.detach().float().cpu().numpy(),
        )

    def _spare_layers(self, layers: Iterable[OffloadedModule]) -> list[OffloadedModule]:
        """Return as many offloaded modulation layers as fit on the GPU while no image is decoded."""
        if self.device == "cpu":
            return []
        spare_layers: list[OffloadedModule] = []
        spare = self.plan.spare
        for part in (layer for layer in layers if not layer.stays_loaded):
            spare -= sum(weight.nbytes for weight in part.module.parameters())
            if spare < 0:
                break
            spare_layers.append(part)
        return spare_layers

    def _resident_parts(self) -> frozenset[str]:
        codecs = {self.spec.decoder, *(["vae"] if self.constraints.image else [])}
        net = {"transformer", *codecs}
        parts = {*self.spec.encoders, *net}
        resident = {"all": parts, "encoders": parts, "net": net, "codec": codecs, "none": set[str]()}
        return frozenset(resident[self.config.residency])

    def _net(self) -> tuple[nn.Module, WeightLoader]:
        """Return the net on the meta device and the loader of its weights, or of the student's."""
        bits = self.config.bits
        dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, self.native)
        net = init_on_meta(self.spec, "transformer", dtype)
        source = self._source("transformer", net, bits, dtype)
        if self.student is not None and self.student.net is not None:
            source = replace(source, weights=Weights.open(self.student.net).matched(net))
        if self.spec.architecture.position_table is not None:
            source = replace(source, window=self._cropped(net))
        return net, source

    def _part(self, part: str, host_buffer: PinnedBuffer) -> OffloadedModule:
        bits = self.config.text_bits if part == self.spec.t5 else self.constraints.native
        module = init_on_meta(self.spec, part, self.native)
        if self.compile and part in self.spec.encoders:
            compile_encoder(module)
        if self.compile and part == self.spec.decoder:
            compile_decoder(module)
        return OffloadedModule(module, self._source(part, module, bits, self.native), host_buffer)

    def _source(self, part: str, module: nn.Module, bits: int, dtype: torch.dtype) -> WeightLoader:
        quantized = quantizable(self.spec, part, module) if bits < 16 else frozenset[str]()
        # Uncompiled on a GPU, channels_last changes layouts around each norm: less memory, more time.
        channels_last = self.device == "cpu" or self.compile or self.plan.limit is not None
        pixels = part in ("vae", "decoder") and channels_last
        update = updates_of(part, self.student, self.loras)
        weights = self.open_weights(self.spec, part).matched(module)
        return WeightLoader(weights, self.device, dtype, bits, quantized, update, pixels=pixels)

    def _cropped(self, net: Any) -> tuple[str, tuple[int, ...], tuple[slice, ...]]:
        """Crop the net's position table to the image; return what to read of its file."""
        embed = net.pos_embed
        full_side, width = int(embed.pos_embed_max_size), embed.pos_embed.shape[-1]
        side = self.spec.pos_embed_crop(self.constraints.latents)
        start = (full_side - side) // 2
        embed.pos_embed_max_size = side
        embed.pos_embed = torch.empty(1, side * side, width, dtype=embed.pos_embed.dtype, device="meta")
        return "pos_embed.pos_embed", (full_side, full_side, width), (slice(start, start + side),) * 2
