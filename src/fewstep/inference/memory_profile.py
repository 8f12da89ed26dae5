"""What the stages of a picture hold in memory, found by shapes alone (floor 3, torch).

The very modules run on tensors without bytes, and every storage is counted
(:mod:`fewstep.modules.memory_tracker`). Of
weights in few bits the layers run as they do on a GPU, or as torchao runs them on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fewstep.core.types import Cond
from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_model import MemoryCosts, StagePeaks
from fewstep.inference.memory_plan import ExecutionConfig, PlanConstraints
from fewstep.inference.meta_init import frozen_parameter, init_from_config, init_on_meta
from fewstep.inference.offloaded import tiled_vae
from fewstep.inference.quantize import quantizable, quantize_weight_only
from fewstep.inference.weight_memory import WeightMemory
from fewstep.modules.adaln import PrecomputedAdaLN, split_modulation
from fewstep.modules.memory_tracker import WORKSPACE, cast_parameters, fake_tensors

FEW = 2
"""Layers of a text encoder that are rehearsed: the others hold as much, one after the other."""


@dataclass(frozen=True)
class MemoryProfiler:
    """A model's sizes.

    Attributes:
        outline: of the model; with a tiny decoder, which is its part ``decoder``.
        family: its family, of stand-ins.
        asked: what it is to do.
    """

    outline: ModelSpec
    family: Any
    asked: PlanConstraints

    @cached_property
    def held(self) -> WeightMemory:
        """What weights hold."""
        return WeightMemory(self.outline, self.asked)

    @cached_property
    def sizes(self) -> MemoryCosts:
        """What a plan asks for, each counted once."""
        return MemoryCosts(
            cache(self.held.weights),
            cache(self.held.layer),
            cache(self.held.reading),
            cache(self.encoding),
            cache(self.stepping),
            cache(self.decoding),
            cache(self.coding),
        )

    def stages(self, choice: ExecutionConfig) -> dict[str, int]:
        """Bytes on the device in each stage of a choice."""
        outline = self.outline
        counted = StagePeaks(self.asked, self.sizes, outline.encoders, outline.t5, outline.decoder, choice)
        return counted.stages()

    def encoding(self, part: str, bits: int) -> int:
        """While it reads a prompt."""
        hidden = {"output_hidden_states": True} if part in self.outline.architecture.hidden_states else {}
        length = self.outline.max_tokens[part]
        config = self.outline.configs[part]
        kept = length * config["hidden_size"] * max(config["num_hidden_layers"] - FEW, 0) if hidden else 0

        def run(net: Any) -> Any:
            return net(torch.zeros(1, length, dtype=torch.long), **hidden)

        return self._beside(part, bits, run) + kept * self.held.dtype(bits).itemsize

    def stepping(self, bits: int, batch: int) -> int:
        """While it walks: modulations of all steps, and a step."""
        rows, channels = batch * self.asked.rows, self.family.latent[0]
        height, width = self.asked.latents
        embedder = self.outline.architecture.modulation

        def run(net: Any) -> Any:
            velocity = replace(self.family.velocity, net=net)
            x = torch.zeros(rows, channels, height, width)
            context = torch.zeros(rows, *self.outline.context_shape)
            cond = Cond(context, torch.zeros(rows, self.outline.pooled_dim))
            steps = PrecomputedAdaLN(velocity, embedder).steps([0.5] * self.asked.steps, cond)
            return x, [step(x) for step in steps[:1]]

        beside = self._beside("transformer", bits, run)
        # The rehearsed net has few blocks; the real one is given the modulations of all.
        short = split_modulation(
            init_on_meta(with_few_blocks(self.outline, "transformer"), "transformer", torch.float32), embedder
        )[0]
        left_out = _made(self.held.modulated[0]) - _made(short)
        beside += self.asked.steps * rows * left_out * self.held.dtype(bits).itemsize
        return beside + (WORKSPACE // 2 if self.asked.gpu else 0)  # of one thread

    def decoding(self, tiles: int, batch: int) -> int:
        """While latents become pixels."""
        channels, (height, width) = self.family.latent[0], self.asked.latents

        def run(net: Any) -> Any:
            latents = torch.zeros(batch, channels, height, width)
            codec = tiled_vae(net, tiles, (height, width), self.outline.downscale)
            return latents, codec.decode(latents).float()

        beside = self._beside(self.outline.decoder, self.asked.native, run)
        if not (self.asked.gpu and self.asked.compile) or self.outline.decoder != "vae":
            return beside
        # Compiled code writes a block's scaled sum over one of its summands.
        narrowest = self.outline.configs["vae"]["block_out_channels"][0]
        pixels = height * width * self.outline.downscale**2 // tiles**2
        return beside - narrowest * pixels * self.held.dtype(self.asked.native).itemsize

    def coding(self, tiles: int) -> int:
        """While the picture to start from becomes latents."""
        height, width = self.asked.latents
        down = self.outline.downscale

        def run(net: Any) -> Any:
            images = torch.zeros(1, 3, down * height, down * width)
            return images, tiled_vae(net, tiles, (height, width), down).encode(images)

        return self._beside("vae", self.asked.native, run)

    def _beside(self, part: str, bits: int, run: Callable[[Any], Any]) -> int:
        """Bytes beside its weights while a part runs, as ``run`` runs it."""
        with (
            warnings.catch_warnings(),
            fake_tensors(gpu=self.asked.gpu) as ledger,
            torch.no_grad(),
            ExitStack() as stack,
        ):
            warnings.simplefilter("ignore")  # torch's, about fake tensors
            short = with_few_blocks(self.outline, part)
            net = cast_parameters(init_from_config(short, part), self.held.dtype(bits)).eval()
            if self.asked.gpu and not self.asked.compile and part in ("vae", "decoder"):
                stack.enter_context(_converting(net))
            if bits < 16:
                fake_quantize(net, quantizable(short, part, net), bits, self.asked.gpu)
            ledger.begin(part)
            before = sum(ledger.live.values())
            kept = run(net)
            most = ledger.peaks[part].total - before
            del kept
        return most


@contextmanager
def _converting(net: Any) -> Generator[None]:
    """As a GPU runs an autoencoder that is not compiled: it convolves in ``channels_last`` and norms in the
    usual layout, and makes copies to change between them."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight = frozen_parameter(layer.weight.contiguous(memory_format=torch.channels_last))
    functional = nn.functional
    convolve, norm = functional.conv2d, functional.group_norm

    def convolved(image: Any, *rest: Any, **options: Any) -> Any:
        return convolve(image.contiguous(memory_format=torch.channels_last), *rest, **options)

    def normed(image: Any, *rest: Any, **options: Any) -> Any:
        return norm(image.contiguous(), *rest, **options)

    with patch.object(functional, "conv2d", convolved), patch.object(functional, "group_norm", normed):
        yield


def with_few_blocks(outline: ModelSpec, part: str) -> ModelSpec:
    """The outline with a net of no more blocks than it has kinds of them; the last of SD3's is a kind."""
    config = dict(outline.configs[part])
    if part == "transformer":
        config = outline.architecture.few_blocks(config, FEW + 1)
    for name in ("num_layers", "num_hidden_layers") if part != "transformer" else ():
        if name in config:
            config[name] = min(int(config[name]), FEW)
    return replace(outline, configs={**outline.configs, part: config})


def fake_quantize(net: Any, names: frozenset[str], bits: int, gpu: bool) -> None:
    """Let layers run as they do on a GPU, or as torchao runs weights of 8 bits on a CPU: they are cast, then
    multiplied."""
    for path in names:
        layer = net.get_submodule(path)
        if gpu:
            quantize_weight_only(layer, bits)
            continue
        weight = layer.weight
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        layer.register_buffer("scale", torch.zeros(weight.shape[0], dtype=weight.dtype))
        layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        layer.forward = _Cast(layer)


@dataclass(frozen=True)
class _Cast:
    layer: Any

    def __call__(self, x: Any) -> Any:
        layer = self.layer
        y = torch.mm(x.reshape(-1, x.shape[-1]), layer.weight.t().to(x.dtype))
        y = (y * layer.scale).reshape(*x.shape[:-1], -1)
        if layer.bias is not None:
            y += layer.bias
        return y


def _made(modulation: Any) -> int:
    """Numbers of all modulations of a sample at one time."""
    return sum(layer.out_features for layer in modulation.layers)
