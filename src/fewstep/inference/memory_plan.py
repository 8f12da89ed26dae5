"""Which parts are where, and in how many bits, so that a picture fits a given memory (floor 3, no torch).

``--memory`` is the one dial. Of all plans that fit, the one is chosen that loses least, and of those the
fastest: bits of the net first, then of T5, then whole decoding before tiles, then how much stays on the
device, then how many pictures run together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from fewstep.core.types import UserError

GIB = 2**30
CONTEXT, FRAGMENTS = 700 * 2**20, 0.03
"""What a card needs beyond what torch's allocator has given out: bytes of the CUDA context and its kernels
(695 MiB on an H200; smaller cards need less), and the share of the allocator's memory that lies idle between
blocks (an assumption)."""

CAUTION = 0.1
"""The share of what is held that stays free where layers could have it."""

Stay = Literal["all", "encoders", "net", "codec", "none"]
"""What stays on the device: everything; all but the modulations, whose layers come one by one there and in
all below; net and codec, while text encoders come in turn; the codec alone, while text encoders and net do;
nothing, one part at a time."""

STAYS: Sequence[Stay] = ("all", "encoders", "net", "codec", "none")

TILES = (1, 2, 4)
"""Tiles along a side in which a picture may be decoded; 1 is whole."""


@dataclass(frozen=True)
class ExecutionConfig:
    """One way to run.

    Attributes:
        bits: of the net's blocks.
        text_bits: of T5.
        tiles: along a side, in which a picture is decoded.
        residency: what stays on the device.
        batch: pictures that run together.
    """

    bits: int
    text_bits: int
    tiles: int
    residency: Stay
    batch: int


@dataclass(frozen=True)
class PlanConstraints:
    """What a plan is for.

    Attributes:
        gpu: whether the device is a GPU; otherwise it is this process's memory.
        native: bits that the device computes in: 32 or 16.
        bits: those to choose from, most first.
        text_bits: those of T5 to choose from.
        batch: pictures that run together at most.
        rows: rows of the net's batch a picture: 2 where a second pass guides.
        steps: of a walk.
        latents: (height, width).
        image: whether there is a picture to start from.
        compile: whether it runs compiled, and on a GPU from recordings.
    """

    gpu: bool
    native: int
    bits: tuple[int, ...]
    text_bits: tuple[int, ...]
    batch: int
    rows: int
    steps: int
    latents: tuple[int, int]
    image: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        config: how to run.
        stages: bytes on the device in each stage of a picture; empty where no memory was given.
        base: bytes that are taken before: by this process on a CPU, by the card's context on a GPU.
        limit: bytes that were allowed, if any.
        gpu: whether they are a card's.
        staying: how many of the modulations' layers, the last ones, stay although the others come one by one.
    """

    config: ExecutionConfig
    stages: Mapping[str, int] = field(default_factory=dict[str, int])
    base: int = 0
    limit: int | None = None
    gpu: bool = False
    staying: int = 0

    @property
    def peak(self) -> int:
        """Most bytes that parts and stages hold, without ``base``."""
        return max(self.stages.values(), default=0)

    @property
    def spare(self) -> int:
        """Bytes of ``peak`` that nothing holds but decoding, and reading of weights."""
        others = [n for stage, n in self.stages.items() if not stage.startswith(("decoding", "reading"))]
        return self.peak - max(others, default=0)

    def describe(self, t5: str) -> list[str]:
        """The plan in two lines.

        Args:
            t5: what becomes of T5: ``kept``, ``left out``, or nothing where there never was one.
        """
        if self.limit is None:
            return []
        stage = max(self.stages, key=lambda name: self.stages[name])
        whole = required_bytes(self)
        layers = f", {self.staying} layers of the modulations stay" if self.staying else ""
        return [
            f"plan for {format_bytes(self.limit)}: {describe_config(self.config, t5)}{layers}",
            f"peak {format_bytes(whole)} of it, in {stage}; "
            f"{format_bytes(self.base)} of that is there before the model",
        ]

    def with_resident_layers(self, layers: Sequence[int]) -> Plan:
        """The plan, with as many of the modulations' layers staying as there is room for with caution: what
        is counted may be a little less than what is held.

        Args:
            layers: bytes of each.
        """
        if self.limit is None or self.config.residency == "all":
            return self
        room = (self.limit - self.base) / (1 + CAUTION) - self.peak
        kept, staying = 0, 0
        for layer in reversed(layers):
            if kept + layer > room:
                break
            kept, staying = kept + layer, staying + 1
        return replace(self, staying=staying, stages={s: held + kept for s, held in self.stages.items()})


RESIDENCY: Mapping[Stay, str] = {
    "all": "all parts stay",
    "encoders": "all parts stay but modulations",
    "net": "net and codec stay, text encoders in turn",
    "codec": "text encoders and net in turn",
    "none": "one part at a time",
}


def describe_config(choice: ExecutionConfig, t5: str) -> str:
    """A choice in words; ``t5`` as of :meth:`Plan.describe`."""
    words = [f"{choice.bits} bits"]
    if t5:
        few = t5 == "kept" and choice.text_bits < 16
        words.append(f"T5 in {choice.text_bits}" if few else f"T5 {t5}")
    words.append(RESIDENCY[choice.residency])
    words.append("decoded whole" if choice.tiles == 1 else f"decoded in tiles, {choice.tiles} a side")
    words.append(f"{choice.batch} at a time")
    return ", ".join(words)


def format_bytes(count: float) -> str:
    """Bytes as people read them: in GiB, and small ones in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def required_bytes(plan: Plan) -> int:
    """Bytes that a card, or this process, must have in all."""
    return int(plan.peak * (1 + (FRAGMENTS if plan.gpu else 0))) + plan.base


def choices(asked: PlanConstraints) -> Iterator[ExecutionConfig]:
    """All ways to run, the one to be preferred first."""
    batches = [asked.batch]
    while batches[-1] > 1:
        batches.append(-(-batches[-1] // 2))
    for bits, text_bits, tiles, stay, batch in product(asked.bits, asked.text_bits, TILES, STAYS, batches):
        yield ExecutionConfig(bits, text_bits, tiles, stay, batch)


def choose(
    asked: PlanConstraints, stages: Callable[[ExecutionConfig], Mapping[str, int]], limit: int, base: int
) -> Plan:
    """The plan that loses least, and is then the fastest, of those that fit.

    Args:
        asked: what for.
        stages: of a choice, and bytes on the device in each.
        limit: bytes allowed in all.
        base: of those, bytes that are taken before.

    Raises:
        UserError: nothing fits; the least that would is told.
    """
    least: Plan | None = None
    for choice in choices(asked):
        plan = Plan(choice, stages(choice), base, limit, asked.gpu)
        if required_bytes(plan) <= limit:
            return plan
        if least is None or required_bytes(plan) < required_bytes(least):
            least = plan
    assert least is not None
    how = describe_config(least.config, "kept" if len(asked.text_bits) > 1 else "")
    raise UserError(
        f"--memory {format_bytes(limit)} is not enough: the least that works here is "
        f"{_up(required_bytes(least))} ({how}), "
        f"{format_bytes(base)} of it before the model"
    )


def _up(count: int) -> str:
    """A size to give as ``--memory`` so that it is enough: rounded up to whole MiB."""
    return f"{-(-count // 2**20)}MiB" if count < GIB else f"{-(-count * 100 // GIB) / 100:.2f}GiB"
