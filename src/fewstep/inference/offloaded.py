"""A model whose parts come to the device when their turn is (floor 3, torch)."""

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
    """The net: a velocity that makes its modulations for all steps of a walk, for which their layers come.

    Attributes:
        place: where its part ``transformer`` is, without the modulations.
        velocity: the family's adapter of it.
        modulation: what makes them.
        layers: the parts that its embedder and layers are, by their ids.
        again: what steps at once, where the net stays in its place.
    """

    place: OffloadManager
    velocity: Any
    modulation: Modulation
    layers: Mapping[int, OffloadedModule]
    again: CUDAGraphCache | None = None

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> ``[B, C, H, W]``."""
        (made,) = self._modulations([self.modulation.inputs(self.velocity, t, cond.pooled)])
        return self._moved(x_t, t, cond.context, made)

    def with_guidance(self, scale: float) -> OffloadedVelocity:
        """The same net at another scale of its embedded guidance, which its modulations alone depend on."""
        return replace(self, velocity=self.velocity.with_guidance(scale))

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """A step for each of ``times``."""
        told = [
            self.modulation.inputs(self.velocity, expand_time(t, cond.context), cond.pooled) for t in times
        ]
        return [partial(self._step, *pair, cond) for pair in zip(times, self._modulations(told), strict=True)]

    def _step(self, t: float, made: Array, cond: Cond, x: Array) -> Array:
        return self._moved(x, expand_time(t, x), cond.context, made)

    def _moved(self, *inputs: Array) -> Array:
        self.place.acquire("transformer")
        with torch.no_grad():
            if self.again is None:
                return self._run(*inputs)
            return self.again("transformer", self._run, *inputs)

    def _run(self, x: Array, t: Array, context: Array, made: Array) -> Array:
        return self.velocity(x, t, Cond(context, made))

    def _modulations(self, told: Sequence[Sequence[Array]]) -> list[Array]:
        with torch.no_grad():
            self.place.acquire_exclusive("transformer")
            return self.modulation.each(told, lambda layer: self.layers[id(layer)].resident())


@dataclass(frozen=True)
class Codec:
    """The autoencoder, one picture at a time; another may decode.

    Attributes:
        place: where its parts are.
        decoder: the part that decodes.
        tiles: along a side.
        latents: (height, width).
        downscale: pixels per latent along a side.
        meanwhile: parts that the next picture begins with, for which there is room unless one is decoded.
    """

    place: OffloadManager
    decoder: str
    tiles: int
    latents: tuple[int, int]
    downscale: int
    meanwhile: Sequence[OffloadedModule] = ()

    def encode(self, images: Array) -> Array:
        """``[B, 3, h, w]`` in [-1, 1] -> ``[B, C, H, W]`` float32."""
        with torch.no_grad():
            return self._codec("vae").encode(images)

    def decode(self, latents: Array) -> Array:
        """``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1], float32."""
        for part in self.meanwhile:
            part.offload()
        with torch.no_grad():
            pixels = self._codec(self.decoder).decode(latents)
        for part in self.meanwhile:
            part.prefetch()
        return pixels

    def _codec(self, part: str) -> LatentCodec:
        return tiled_vae(self.place.acquire(part), self.tiles, self.latents, self.downscale)


def tiled_vae(vae: Any, tiles: int, latents: tuple[int, int], downscale: int) -> LatentCodec:
    """The codec, one picture at a time, each in ``tiles`` x ``tiles`` tiles (with what they overlap)."""
    vae.enable_slicing()
    for layer in vae.modules():
        if isinstance(layer, nn.SiLU):  # what a norm gave, which nobody reads again
            layer.inplace = True
    if tiles > 1:
        vae.enable_tiling()
        side = -(-max(latents) // tiles)
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * downscale
    return LatentCodec(vae)
