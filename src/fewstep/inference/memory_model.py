"""What a choice holds in each stage of a picture (floor 3, no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fewstep.inference.memory_plan import ExecutionConfig, PlanConstraints


@dataclass(frozen=True)
class MemoryCosts:
    """Bytes that parts and stages hold; each is asked for when a plan needs it.

    Attributes:
        weights: ``(part, bits)`` -> bytes of its weights; ``modulation`` is a part.
        layer: bits -> bytes of the largest layer of the modulations.
        reading: ``(part, bits)`` -> bytes at most while it is read, its weights so far among them.
        encoding: ``(encoder, bits)`` -> bytes beside the weights while a prompt is read.
        stepping: ``(bits, batch)`` -> the same of the net's steps.
        decoding: ``(tiles, batch)`` -> the same of a batch's decoding.
        coding: tiles -> the same of an input picture's encoding.
    """

    weights: Callable[[str, int], int]
    layer: Callable[[int], int]
    reading: Callable[[str, int], int]
    encoding: Callable[[str, int], int]
    stepping: Callable[[int, int], int]
    decoding: Callable[[int, int], int]
    coding: Callable[[int], int]


@dataclass(frozen=True)
class StagePeaks:
    """The stages of one choice, in bytes."""

    asked: PlanConstraints
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
        return self.asked.native

    def _held(self, parts: Sequence[str]) -> int:
        return sum(self.sizes.weights(part, self._bits(part)) for part in parts)

    @cached_property
    def _codecs(self) -> list[str]:
        return sorted({self.decoder, *(["vae"] if self.asked.image else [])})

    def stages(self) -> dict[str, int]:
        """Bytes on the device in each."""
        choice, sizes, asked = self.choice, self.sizes, self.asked
        names = [*self.encoders, "transformer", *self._codecs]
        everything = [*names, "modulation"]
        beside = {
            "all": everything,
            "encoders": names,
            "net": ["transformer", *self._codecs],
            "codec": self._codecs,
            "none": [],
        }[choice.residency]

        def with_others(*parts: str) -> int:
            return self._held(list({*beside, *parts}))

        step = sizes.stepping(choice.bits, choice.batch)
        recorded = step if asked.gpu and asked.compile and "transformer" in beside else 0
        found: dict[str, int] = {}
        for part in names:
            others = [other for other in beside if other != part]
            found[f"reading {part}"] = self._held(others) + sizes.reading(part, self._bits(part))
        for part in self.encoders:
            found[f"the prompt ({part})"] = with_others(part) + sizes.encoding(part, self._bits(part))
        layer = 0 if choice.residency == "all" else sizes.layer(choice.bits)
        found["the modulations"] = with_others("transformer") + layer
        found["the steps"] = with_others("transformer") + step
        # A codec that stays comes to where the net is, or the encoder that read last.
        net = ["transformer"] if choice.residency == "codec" else []
        guests = [*self.encoders, *net] if choice.residency in ("net", "codec") else []
        last = [max(guests, key=lambda part: self._held([part]))] if guests else []
        found["decoding"] = with_others(self.decoder, *net) + sizes.decoding(choice.tiles, choice.batch)
        if self.asked.image:
            found["encoding the picture"] = with_others("vae", *last) + sizes.coding(choice.tiles)
        # A recording of the steps keeps what they need, beside those of another kind that is tried first.
        return {
            stage: size + (0 if stage.startswith("reading") else recorded) for stage, size in found.items()
        }
