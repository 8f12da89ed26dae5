"""The net and the autoencoder of a model with offloaded parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fewstep.core.flow import expand_time
from fewstep.core.types import Array, Cond, Step
from fewstep.families.common import LatentCodec
from fewstep.inference.cuda_graphs import CUDAGraphCache
from fewstep.inference.offload import OffloadedModule, OffloadManager
from fewstep.modules.adaln import Modulation


@dataclass(frozen=True)
class OffloadedVelocity:
    """The velocity of an offloaded net, which computes the modulations of all sampling steps first.

    Attributes:
        manager: the manager of the part ``transformer``, which has no modulation layers.
        velocity: the family's velocity of the net.
        modulation: the modulation layers.
        layers: the offloaded modules of the time embedder and the modulation layers, by ``id``.
        graph_cache: CUDA graphs, if the net is resident.
    """

    manager: OffloadManager
    velocity: Any
    modulation: Modulation
    layers: Mapping[int, OffloadedModule]
    graph_cache: CUDAGraphCache | None = None

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """Predict the velocity ``[B, C, H, W]`` of ``x_t [B, C, H, W]`` at ``t [B]``."""
        (modulation,) = self._modulations([self.modulation.inputs(self.velocity, t, cond.pooled)])
        return self._velocity(x_t, t, cond.context, modulation)

    def with_guidance(self, scale: float) -> OffloadedVelocity:
        """Return this velocity with another embedded guidance scale, on which only the modulations depend."""
        return replace(self, velocity=self.velocity.with_guidance(scale))

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """Return one step per time, with precomputed modulations."""
        inputs = [
            self.modulation.inputs(self.velocity, expand_time(t, cond.context), cond.pooled) for t in times
        ]
        return [
            partial(self._step, *pair, cond) for pair in zip(times, self._modulations(inputs), strict=True)
        ]

    def _step(self, t: float, modulation: Array, cond: Cond, x: Array) -> Array:
        return self._velocity(x, expand_time(t, x), cond.context, modulation)

    def _velocity(self, *inputs: Array) -> Array:
        self.manager.acquire("transformer")
        with torch.no_grad():
            if self.graph_cache is None:
                return self._run(*inputs)
            return self.graph_cache("transformer", self._run, *inputs)

    def _run(self, x: Array, t: Array, context: Array, modulation: Array) -> Array:
        return self.velocity(x, t, Cond(context, modulation))

    def _modulations(self, inputs: Sequence[Sequence[Array]]) -> list[Array]:
        with torch.no_grad():
            self.manager.acquire_exclusive("transformer")
            return self.modulation.each(inputs, lambda layer: self.layers[id(layer)].resident())


@dataclass(frozen=True)
class Codec:
    """The autoencoder, which processes one image at a time.

    Attributes:
        manager: the manager of its parts.
        decoder: name of the part that decodes, ``vae`` or a tiny ``decoder``.
        tiles: tiles per side for decoding.
        latents: (height, width).
        downscale: pixels per latent along a side.
        meanwhile: modules for the start of the next image, offloaded while an image is decoded.
    """

    manager: OffloadManager
    decoder: str
    tiles: int
    latents: tuple[int, int]
    downscale: int
    meanwhile: Sequence[OffloadedModule] = ()

    def encode(self, images: Array) -> Array:
        """Encode ``[B, 3, h, w]`` in [-1, 1] as ``[B, C, H, W]`` float32."""
        with torch.no_grad():
            return self._codec("vae").encode(images)

    def decode(self, latents: Array) -> Array:
        """Decode ``[B, C, H, W]`` to ``[B, 3, h, w]`` float32, about [-1, 1]."""
        for part in self.meanwhile:
            part.offload()
        with torch.no_grad():
            pixels = self._codec(self.decoder).decode(latents)
        for part in self.meanwhile:
            part.prefetch()
        return pixels

    def _codec(self, part: str) -> LatentCodec:
        return tiled_vae(self.manager.acquire(part), self.tiles, self.latents, self.downscale)


def tiled_vae(vae: Any, tiles: int, latents: tuple[int, int], downscale: int) -> LatentCodec:
    """Return the codec with one image per pass and ``tiles`` x ``tiles`` overlapping tiles."""
    vae.enable_slicing()
    for layer in vae.modules():
        if isinstance(layer, nn.SiLU):  # its input, a norm's output, is not used graph_cache
            layer.inplace = True
    if tiles > 1:
        vae.enable_tiling()
        side = -(-max(latents) // tiles)
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * downscale
    return LatentCodec(vae)
