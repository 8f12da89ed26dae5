"""Memory profile of the stages of generation, measured without weights.

The model's modules run on fake tensors, and every storage is counted (:mod:`fewstep.modules.memory_tracker`).
Quantized layers run as on a GPU, or as torchao runs them on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fewstep.core.types import Cond
from fewstep.families.base import Family
from fewstep.families.spec import ModelSpec
from fewstep.inference.memory_model import MemoryCosts, StagePeaks
from fewstep.inference.memory_plan import ExecutionConfig, PlanConstraints
from fewstep.inference.meta_init import frozen_parameter, init_from_config, init_on_meta
from fewstep.inference.offloaded import tiled_vae
from fewstep.inference.quantize import quantizable, quantize_weight_only
from fewstep.inference.weight_memory import WeightMemory
from fewstep.modules.adaln import PrecomputedAdaLN, split_modulation
from fewstep.modules.memory_tracker import WORKSPACE, cast_parameters, fake_tensors

PROFILED_LAYERS = 2
"""Number of text encoder layers that are profiled. The others reuse the same memory in turn."""


@dataclass(frozen=True)
class MemoryProfiler:
    """Measures the memory of a model.

    Attributes:
        spec: the model; a tiny decoder is its part ``decoder``.
        family: its family, with placeholders for the nets.
        constraints: device, candidates and workload.
    """

    spec: ModelSpec
    family: Family
    constraints: PlanConstraints

    @cached_property
    def weight_memory(self) -> WeightMemory:
        """The sizes of the weights."""
        return WeightMemory(self.spec, self.constraints)

    @cached_property
    def costs(self) -> MemoryCosts:
        """The sizes that a plan needs, each measured once."""
        return MemoryCosts(
            cache(self.weight_memory.weights),
            cache(self.weight_memory.layer),
            cache(self.weight_memory.reading),
            cache(self.encoding),
            cache(self.stepping),
            cache(self.decoding),
            cache(self.image_encoding),
        )

    def stages(self, choice: ExecutionConfig) -> dict[str, int]:
        """Return the bytes on the device in each stage with this configuration."""
        spec = self.spec
        peaks = StagePeaks(self.constraints, self.costs, spec.encoders, spec.t5, spec.decoder, choice)
        return peaks.stages()

    def encoding(self, part: str, bits: int) -> int:
        """Return the bytes of a text encoder's activations for one prompt."""
        hidden = {"output_hidden_states": True} if part in self.spec.architecture.hidden_states else {}
        length = self.spec.max_tokens[part]
        config = self.spec.configs[part]
        retained = (
            length * config["hidden_size"] * max(config["num_hidden_layers"] - PROFILED_LAYERS, 0)
            if hidden
            else 0
        )

        def run(net: nn.Module) -> object:
            return net(torch.zeros(1, length, dtype=torch.long), **hidden)

        return self._activation_peak(part, bits, run) + retained * self.weight_memory.dtype(bits).itemsize

    def stepping(self, bits: int, batch: int) -> int:
        """Return the bytes of the modulations of all steps and of one step's activations."""
        rows, channels = batch * self.constraints.rows, self.family.latent[0]
        height, width = self.constraints.latents
        embedder = self.spec.architecture.modulation

        def run(net: nn.Module) -> object:
            velocity = replace(cast("Any", self.family.velocity), net=net)
            x = torch.zeros(rows, channels, height, width)
            context = torch.zeros(rows, *self.spec.context_shape)
            cond = Cond(context, torch.zeros(rows, self.spec.pooled_dim))
            steps = PrecomputedAdaLN(velocity, embedder).steps([0.5] * self.constraints.steps, cond)
            return x, [step(x) for step in steps[:1]]

        nbytes = self._activation_peak("transformer", bits, run)
        # The profiled net has few blocks, so the modulations of the others are added.
        short = split_modulation(
            init_on_meta(with_few_blocks(self.spec, "transformer"), "transformer", torch.float32), embedder
        )[0]
        left_out = _modulation_size(self.weight_memory.modulated[0]) - _modulation_size(short)
        nbytes += self.constraints.steps * rows * left_out * self.weight_memory.dtype(bits).itemsize
        # The net runs in one thread, which uses half of the workspace.
        return nbytes + (WORKSPACE // 2 if self.constraints.gpu else 0)

    def decoding(self, tiles: int, batch: int) -> int:
        """Return the bytes of decoding a batch."""
        channels, (height, width) = self.family.latent[0], self.constraints.latents

        def run(net: nn.Module) -> object:
            latents = torch.zeros(batch, channels, height, width)
            codec = tiled_vae(net, tiles, (height, width), self.spec.downscale)
            return latents, codec.decode(latents).float()

        nbytes = self._activation_peak(self.spec.decoder, self.constraints.native, run)
        if not (self.constraints.gpu and self.constraints.compile) or self.spec.decoder != "vae":
            return nbytes
        # Compiled code writes a block's scaled sum in place.
        narrowest = self.spec.configs["vae"]["block_out_channels"][0]
        pixels = height * width * self.spec.downscale**2 // tiles**2
        return nbytes - narrowest * pixels * self.weight_memory.dtype(self.constraints.native).itemsize

    def image_encoding(self, tiles: int) -> int:
        """Return the bytes of encoding an input image."""
        height, width = self.constraints.latents
        down = self.spec.downscale

        def run(net: nn.Module) -> object:
            images = torch.zeros(1, 3, down * height, down * width)
            return images, tiled_vae(net, tiles, (height, width), down).encode(images)

        return self._activation_peak("vae", self.constraints.native, run)

    def _activation_peak(self, part: str, bits: int, run: Callable[[nn.Module], object]) -> int:
        """Return the peak bytes beside the weights while ``run`` runs a part."""
        with (
            warnings.catch_warnings(),
            fake_tensors(gpu=self.constraints.gpu) as ledger,
            torch.no_grad(),
            ExitStack() as stack,
        ):
            warnings.simplefilter("ignore")  # torch warns about fake tensors
            short = with_few_blocks(self.spec, part)
            net = cast_parameters(init_from_config(short, part), self.weight_memory.dtype(bits)).eval()
            if self.constraints.gpu and not self.constraints.compile and part in ("vae", "decoder"):
                stack.enter_context(_layout_copies(net))
            if bits < 16:
                fake_quantize(net, quantizable(short, part, net), bits, self.constraints.gpu)
            ledger.begin(part)
            before = sum(ledger.live.values())
            output = run(net)
            peak = ledger.peaks[part].total - before
            del output
        return peak


@contextmanager
def _layout_copies(net: nn.Module) -> Generator[None]:
    """Emulate the memory layouts of an uncompiled autoencoder on a GPU.

    Convolutions run in ``channels_last`` and norms in the contiguous layout, with copies in between.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight = frozen_parameter(layer.weight.contiguous(memory_format=torch.channels_last))
    functional = nn.functional
    convolve, norm = functional.conv2d, functional.group_norm

    def convolved(image: Tensor, *rest: Any, **options: Any) -> Tensor:
        return convolve(image.contiguous(memory_format=torch.channels_last), *rest, **options)

    def normed(image: Tensor, *rest: Any, **options: Any) -> Tensor:
        return norm(image.contiguous(), *rest, **options)

    with patch.object(functional, "conv2d", convolved), patch.object(functional, "group_norm", normed):
        yield


def with_few_blocks(spec: ModelSpec, part: str) -> ModelSpec:
    """Return a spec whose net has one block of each kind. The last block of SD3 is a kind of its own."""
    config = dict(spec.configs[part])
    if part == "transformer":
        config = spec.architecture.few_blocks(config, PROFILED_LAYERS + 1)
    for name in ("num_layers", "num_hidden_layers") if part != "transformer" else ():
        if name in config:
            config[name] = min(int(config[name]), PROFILED_LAYERS)
    return replace(spec, configs={**spec.configs, part: config})


def fake_quantize(net: Any, names: frozenset[str], bits: int, gpu: bool) -> None:
    """Replace layers by quantized ones without values.

    They run as on a GPU, or as torchao runs 8-bit weights on a CPU: cast, then multiplied.
    """
    for path in names:
        layer = net.get_submodule(path)
        if gpu:
            quantize_weight_only(layer, bits)
            continue
        weight = layer.weight
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        layer.register_buffer("scale", torch.zeros(weight.shape[0], dtype=weight.dtype))
        layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        layer.forward = _CastLinear(layer)


@dataclass(frozen=True)
class _CastLinear:
    layer: Any

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        y = torch.mm(x.reshape(-1, x.shape[-1]), layer.weight.t().to(x.dtype))
        y = (y * layer.scale).reshape(*x.shape[:-1], -1)
        if layer.bias is not None:
            y += layer.bias
        return y


def _modulation_size(modulation: Any) -> int:
    """Return the number of modulation values of one sample at one time."""
    return sum(layer.out_features for layer in modulation.layers)
