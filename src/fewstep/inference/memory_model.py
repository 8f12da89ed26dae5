"""The memory of a configuration in each stage of generation. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fewstep.inference.memory_plan import ExecutionConfig, PlanConstraints


@dataclass(frozen=True)
class MemoryCosts:
    """Functions that return the bytes of parts and stages, called when a plan needs them.

    Attributes:
        weights: weights of ``(part, bits)``. ``modulation`` is a part of its own.
        layer: the largest modulation layer in ``bits``.
        reading: peak while the weights of ``(part, bits)`` are read, with the weights already read.
        encoding: activations of a text encoder ``(part, bits)`` for one prompt.
        stepping: activations of the net's steps for ``(bits, batch)``.
        decoding: activations of decoding for ``(tiles, batch)``.
        image_encoding: activations of encoding an input image with ``tiles``.
    """

    weights: Callable[[str, int], int]
    layer: Callable[[int], int]
    reading: Callable[[str, int], int]
    encoding: Callable[[str, int], int]
    stepping: Callable[[int, int], int]
    decoding: Callable[[int, int], int]
    image_encoding: Callable[[int], int]


@dataclass(frozen=True)
class StagePeaks:
    """The stages of generation with one configuration, in bytes."""

    constraints: PlanConstraints
    sizes: MemoryCosts
    encoders: Sequence[str]
    t5: str | None
    decoder: str
    choice: ExecutionConfig

    def _bits(self, part: str) -> int:
        if part in ("transformer", "modulation"):
            return self.choice.bits
        if part == self.t5:
            return self.choice.text_bits
        return self.constraints.native

    def _weights(self, parts: Sequence[str]) -> int:
        return sum(self.sizes.weights(part, self._bits(part)) for part in parts)

    @cached_property
    def _codecs(self) -> list[str]:
        return sorted({self.decoder, *(["vae"] if self.constraints.image else [])})

    def stages(self) -> dict[str, int]:
        """Return the bytes on the device in each stage."""
        choice, sizes, constraints = self.choice, self.sizes, self.constraints
        names = [*self.encoders, "transformer", *self._codecs]
        everything = [*names, "modulation"]
        resident = {
            "all": everything,
            "encoders": names,
            "net": ["transformer", *self._codecs],
            "codec": self._codecs,
            "none": [],
        }[choice.residency]

        def resident_and(*parts: str) -> int:
            return self._weights(list({*resident, *parts}))

        step = sizes.stepping(choice.bits, choice.batch)
        captured = step if constraints.gpu and constraints.compile and "transformer" in resident else 0
        stages: dict[str, int] = {}
        for part in names:
            others = [other for other in resident if other != part]
            stages[f"reading {part}"] = self._weights(others) + sizes.reading(part, self._bits(part))
        for part in self.encoders:
            stages[f"the prompt ({part})"] = resident_and(part) + sizes.encoding(part, self._bits(part))
        layer = 0 if choice.residency == "all" else sizes.layer(choice.bits)
        stages["the modulations"] = resident_and("transformer") + layer
        stages["the steps"] = resident_and("transformer") + step
        # A resident VAE is loaded while the net, or the last text encoder, is on the device.
        net = ["transformer"] if choice.residency == "codec" else []
        transient = [*self.encoders, *net] if choice.residency in ("net", "codec") else []
        last = [max(transient, key=lambda part: self._weights([part]))] if transient else []
        stages["decoding"] = resident_and(self.decoder, *net) + sizes.decoding(choice.tiles, choice.batch)
        if self.constraints.image:
            stages["encoding the image"] = resident_and("vae", *last) + sizes.image_encoding(choice.tiles)
        # Captured steps keep their memory beside that of another input shape, which is tried first.
        return {
            stage: size + (0 if stage.startswith("reading") else captured) for stage, size in stages.items()
        }
