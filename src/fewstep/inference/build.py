"""A model put together, its parts where a plan says (floor 3, torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

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
from fewstep.inference.student_weights import PartUpdates, Student, change_of
from fewstep.modules.adaln import split_modulation

Opened = Callable[[ModelSpec, str], Weights]
"""(outline, part) -> where the part's weights come from."""


def on_disk(outline: ModelSpec, part: str) -> Weights:
    """The weights of a part in its folder."""
    return Weights.open(outline.place(part))


@dataclass(frozen=True)
class ModelBuilder:
    """What a model is put together of.

    Attributes:
        outline: its parts.
        family: its family, of stand-ins.
        asked: what was planned for.
        plan: what runs where.
        student: what is laid over the net.
        device: where it runs.
        opened: where weights come from.
        compile: the net's blocks, text encoders and decoder.
        loras: what LoRAs add to its parts.
    """

    outline: ModelSpec
    family: Family
    asked: PlanConstraints
    plan: Plan
    student: Student | None
    device: str
    opened: Opened
    compile: bool
    loras: PartUpdates = field(default_factory=dict[str, Updates])

    @property
    def choice(self) -> ExecutionConfig:
        """How to run."""
        return self.plan.config

    @property
    def native(self) -> torch.dtype:
        """What the device computes in."""
        return torch.float32 if self.asked.native == 32 else torch.bfloat16

    def model(self) -> Model:
        """The model, with what stays on the device.

        Raises:
            UserError: weights are missing, or of another shape than configurations say.
        """
        outline, family, (height, width) = self.outline, self.family, self.asked.latents
        net, source = self._net()
        paths = {id(layer): f"{path}." for path, layer in net.named_modules()}
        modulation, body = split_modulation(net, outline.architecture.modulation)
        if self.compile:
            compile_blocks(body)
        apart = (modulation.embedder, *modulation.layers) if modulation.layers else ()
        shelf = PinnedBuffer()
        leaving = 0 if self.choice.residency == "all" else len(apart) - self.plan.staying
        layers = {
            id(layer): OffloadedModule(layer, source, shelf, paths[id(layer)], stays=index >= leaving)
            for index, layer in enumerate(apart)
        }
        others = {part: self._part(part, shelf) for part in outline.configs if part != "transformer"}
        place = OffloadManager({"transformer": OffloadedModule(body, source, shelf), **others}, self._stay())
        for layer in layers.values():
            if layer.stays:
                layer.load()
        place.load_resident()
        velocity: Any = family.velocity
        text: Any = family.text
        again = CUDAGraphCache() if self.compile and self.device != "cpu" else None
        settled = {part: again if part in place.stay else None for part in place.parts}
        encoders = {part: UnbatchedEncoder(place, part, settled[part]) for part in outline.encoders}
        codec = Codec(place, outline.decoder, self.choice.tiles, self.asked.latents, outline.downscale)
        return Model(
            name=family.name,
            velocity=OffloadedVelocity(
                place, replace(velocity, net=body), modulation, layers, settled["transformer"]
            ),
            text=CachedTextEncoder(replace(text, parts={**text.parts, **encoders}), self.device, self.native),
            codec=replace(codec, meanwhile=self._meanwhile(layers.values())),
            latent=(family.latent[0], height, width),
            downscale=outline.downscale,
            shift=shift_for_size(outline, family, self.asked.latents),
            steps=family.steps,
            guidance=family.guidance,
            embedded_guidance=family.embedded_guidance,
            sampler=family.sampler,
            from_numpy=lambda array: torch.from_numpy(array).to(self.device),
            to_numpy=lambda tensor: tensor.detach().float().cpu().numpy(),
        )

    def _meanwhile(self, layers: Iterable[OffloadedModule]) -> list[OffloadedModule]:
        """Of the modulations' layers that leave as many as there is room for while nothing is decoded."""
        if self.device == "cpu":
            return []
        found: list[OffloadedModule] = []
        room = self.plan.spare
        for part in (layer for layer in layers if not layer.stays):
            room -= sum(weight.nbytes for weight in part.module.parameters())
            if room < 0:
                break
            found.append(part)
        return found

    def _stay(self) -> frozenset[str]:
        codecs = {self.outline.decoder, *(["vae"] if self.asked.image else [])}
        net = {"transformer", *codecs}
        parts = {*self.outline.encoders, *net}
        staying = {"all": parts, "encoders": parts, "net": net, "codec": codecs, "none": set[str]()}
        return frozenset(staying[self.choice.residency])

    def _net(self) -> tuple[Any, WeightLoader]:
        """The net, and where its weights come from: its own or a student's."""
        bits = self.choice.bits
        dtype = {32: torch.float32, 16: torch.bfloat16}.get(bits, self.native)
        net = init_on_meta(self.outline, "transformer", dtype)
        source = self._source("transformer", net, bits, dtype)
        if self.student is not None and self.student.net is not None:
            source = replace(source, weights=Weights.open(self.student.net).matched(net))
        if self.outline.architecture.position_table is not None:
            source = replace(source, window=self._cropped(net))
        return net, source

    def _part(self, part: str, shelf: PinnedBuffer) -> OffloadedModule:
        bits = self.choice.text_bits if part == self.outline.t5 else self.asked.native
        module = init_on_meta(self.outline, part, self.native)
        if self.compile and part in self.outline.encoders:
            compile_encoder(module)
        if self.compile and part == self.outline.decoder:
            compile_decoder(module)
        return OffloadedModule(module, self._source(part, module, bits, self.native), shelf)

    def _source(self, part: str, module: Any, bits: int, dtype: torch.dtype) -> WeightLoader:
        few = quantizable(self.outline, part, module) if bits < 16 else frozenset[str]()
        # What a GPU does not compile changes layouts around each norm: less memory, and more time.
        sparing = self.device == "cpu" or self.compile or self.plan.limit is not None
        pixels = part in ("vae", "decoder") and sparing
        change = change_of(part, self.student, self.loras)
        weights = self.opened(self.outline, part).matched(module)
        return WeightLoader(weights, self.device, dtype, bits, few, change, pixels=pixels)

    def _cropped(self, net: Any) -> tuple[str, tuple[int, ...], tuple[slice, ...]]:
        """Leave of the net's table of positions what the picture needs; what to read of its file."""
        embed = net.pos_embed
        most, width = int(embed.pos_embed_max_size), embed.pos_embed.shape[-1]
        side = self.outline.pos_embed_crop(self.asked.latents)
        start = (most - side) // 2
        embed.pos_embed_max_size = side
        embed.pos_embed = torch.empty(1, side * side, width, dtype=embed.pos_embed.dtype, device="meta")
        return "pos_embed.pos_embed", (most, most, width), (slice(start, start + side),) * 2
