"""A model whose parts come to the device when their turn is (floor 3, torch)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fewstep.families.common import LatentCodec
from fewstep.flow import fill
from fewstep.nets.hoist import Modulation
from fewstep.staged.parts import Part, Place
from fewstep.staged.rehearse import sliced
from fewstep.types import Array, Cond, Step, TextEncoder

CACHED = 64
"""Prompts whose embeddings are kept, in the precision that their encoders speak."""


@dataclass
class Text:
    """Text encoders that remember what they read.

    Attributes:
        encode: the family's, whose encoders read a prompt at a time
            (:class:`fewstep.staged.parts.Encoders`).
        device: where conditions go.
        dtype: what the encoders compute in.
    """

    encode: TextEncoder
    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._known: OrderedDict[str, Cond] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` prompts -> context ``[B, L, D]`` and pooled ``[B, P]``, float32."""
        self.prepare(prompts)
        rows = [self._known[text] for text in prompts]
        context, pooled = (
            torch.cat([getattr(row, name) for row in rows]).to(self.device).float()
            for name in ("context", "pooled")
        )
        return Cond(context, pooled)

    def forget(self) -> None:
        """Forget all prompts."""
        self._known.clear()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Read prompts that are not known, before the net needs the room; the oldest are forgotten."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._known]
        if not new:
            return
        made = self.encode(new).map(lambda array: array.to("cpu", self.dtype))
        for row, text in enumerate(new):
            self._known[text] = made[row : row + 1]
        while len(self._known) > max(CACHED, len(set(prompts))):
            self._known.popitem(last=False)


@dataclass(frozen=True)
class Walker:
    """The net: a velocity that makes its modulations for all steps of a walk, whose layers then may leave.

    Attributes:
        place: where its part ``transformer`` is, without the modulations.
        velocity: the family's adapter of it.
        modulation: what makes them.
        layers: the parts that its layers are, by their ids, where they come one by one; else ``modulation``
            is in ``place``.
    """

    place: Place
    velocity: Any
    modulation: Modulation
    layers: Mapping[int, Part]

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> ``[B, C, H, W]``."""
        (made,) = self._modulations([self.velocity.embedded(t, cond.pooled)])
        self.place.take("transformer")
        with torch.no_grad():
            return self.velocity(x_t, t, Cond(cond.context, made))

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """A step for each of ``times``."""
        told = [self.velocity.embedded(fill(t, cond.context), cond.pooled) for t in times]
        return [partial(self._step, *pair, cond) for pair in zip(times, self._modulations(told), strict=True)]

    def _step(self, t: float, made: Array, cond: Cond, x: Array) -> Array:
        self.place.take("transformer")
        with torch.no_grad():
            return self.velocity(x, fill(t, x), Cond(cond.context, made))

    def _modulations(self, told: Sequence[Sequence[Array]]) -> list[Array]:
        with torch.no_grad():
            if not self.layers:
                self.place.take("modulation")
                return self.modulation.each(told)
            self.place.take("transformer")  # whoever had the room before leaves
            return self.modulation.each(told, self._at_hand)

    def _at_hand(self, layer: Any) -> AbstractContextManager[None]:
        return self.layers[id(layer)].visit()


@dataclass(frozen=True)
class Codec:
    """The autoencoder, one picture at a time; another may decode.

    Attributes:
        place: where its parts are.
        decoder: the part that decodes.
        tiles: along a side.
        latents: (height, width).
        downscale: pixels per latent along a side.
    """

    place: Place
    decoder: str
    tiles: int
    latents: tuple[int, int]
    downscale: int

    def encode(self, images: Array) -> Array:
        """``[B, 3, h, w]`` in [-1, 1] -> ``[B, C, H, W]`` float32."""
        with torch.no_grad():
            return self._codec("vae").encode(images)

    def decode(self, latents: Array) -> Array:
        """``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1], float32."""
        with torch.no_grad():
            return self._codec(self.decoder).decode(latents)

    def _codec(self, part: str) -> LatentCodec:
        return sliced(self.place.take(part), self.tiles, self.latents, self.downscale)
