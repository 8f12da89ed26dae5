"""The memory plan: precision, residency, tiling and batch size within a memory limit.

``--memory`` is the only setting. Of all plans that fit, the one with the best quality is chosen, and of those
the fastest. The order of preference is: bits of the net, bits of T5, decoding without tiles, resident parts,
batch size. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

from fewstep.core.types import UserError

GIB = 2**30
CONTEXT, FRAGMENTS = 700 * 2**20, 0.03
"""Memory of a GPU beyond that of torch's allocator.

The first is the CUDA context with its kernels, in bytes (695 MiB on an H200; smaller GPUs need less). The
second is the assumed fraction of the allocator's memory that fragmentation wastes."""

RESERVE = 0.1
"""Fraction of the peak that stays free when spare memory is given to resident layers."""

Residency = Literal["all", "encoders", "net", "codec", "none"]
"""Parts that stay on the device.

* ``all``: every part.
* ``encoders``: every part but the modulation layers, which are loaded one by one. This holds for all below.
* ``net``: the net and the VAE. Text encoders are loaded in turn.
* ``codec``: the VAE. Text encoders and the net are loaded in turn.
* ``none``: one part at a time.
"""

RESIDENCIES: Sequence[Residency] = ("all", "encoders", "net", "codec", "none")

TILES = (1, 2, 4)
"""Possible numbers of tiles per side for decoding; 1 is no tiling."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How a model runs.

    Attributes:
        bits: bits per weight of the net's blocks.
        text_bits: bits per weight of T5.
        tiles: tiles per side for decoding.
        residency: parts that stay on the device.
        batch: images per batch.
    """

    bits: int
    text_bits: int
    tiles: int
    residency: Residency
    batch: int


@dataclass(frozen=True)
class PlanConstraints:
    """Device, candidates and workload of a plan.

    Attributes:
        gpu: whether the device is a GPU. Otherwise the limit is on the memory of this process.
        native: bits of the device's arithmetic: 32 or 16.
        bits: candidates of the net's bits per weight, the largest first.
        text_bits: candidates of T5's bits per weight.
        batch: largest number of images per batch.
        rows: rows of the net's batch per image: 2 with classifier-free guidance, else 1.
        steps: number of sampling steps.
        latents: (height, width).
        image: whether generation starts from an image.
        compile: whether the model is compiled, and on a GPU captured in CUDA graphs.
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
    """A chosen configuration with its memory.

    Attributes:
        config: how the model runs.
        stages: bytes on the device by stage of generation; empty without a limit.
        base: bytes in use before the model: by this process on a CPU, by the CUDA context on a GPU.
        limit: the memory limit in bytes, if any.
        gpu: whether the device is a GPU.
        resident_layers: number of modulation layers, counted from the last, that stay on the device while the
            others are loaded one by one.
    """

    config: ExecutionConfig
    stages: Mapping[str, int] = field(default_factory=dict[str, int])
    base: int = 0
    limit: int | None = None
    gpu: bool = False
    resident_layers: int = 0

    @property
    def peak(self) -> int:
        """Peak memory of all stages in bytes, without ``base``."""
        return max(self.stages.values(), default=0)

    @property
    def spare(self) -> int:
        """Bytes of ``peak`` that only decoding and reading of weights use."""
        others = [n for stage, n in self.stages.items() if not stage.startswith(("decoding", "reading"))]
        return self.peak - max(others, default=0)

    def describe(self, t5: str) -> list[str]:
        """Describe the plan in two lines; without a limit in none.

        Args:
            t5: ``kept``, ``left out``, or empty if the model has no T5.
        """
        if self.limit is None:
            return []
        stage = max(self.stages, key=lambda name: self.stages[name])
        required = required_bytes(self)
        layers = f", {self.resident_layers} layers of the modulations stay" if self.resident_layers else ""
        return [
            f"plan for {format_bytes(self.limit)}: {describe_config(self.config, t5)}{layers}",
            f"peak {format_bytes(required)} of it, in {stage}; "
            f"{format_bytes(self.base)} of that is there before the model",
        ]

    def with_resident_layers(self, layers: Sequence[int]) -> Plan:
        """Return the plan with as many resident modulation layers as fit.

        A fraction of :data:`RESERVE` stays free, because the estimate may be a little low.

        Args:
            layers: size of each layer in bytes.
        """
        if self.limit is None or self.config.residency == "all":
            return self
        spare = (self.limit - self.base) / (1 + RESERVE) - self.peak
        used, resident_layers = 0, 0
        for layer in reversed(layers):
            if used + layer > spare:
                break
            used, resident_layers = used + layer, resident_layers + 1
        return replace(
            self, resident_layers=resident_layers, stages={s: size + used for s, size in self.stages.items()}
        )


RESIDENCY_TEXT: Mapping[Residency, str] = {
    "all": "all parts stay",
    "encoders": "all parts stay but modulations",
    "net": "net and codec stay, text encoders in turn",
    "codec": "text encoders and net in turn",
    "none": "one part at a time",
}


def describe_config(choice: ExecutionConfig, t5: str) -> str:
    """Describe a configuration; ``t5`` is as in :meth:`Plan.describe`."""
    words = [f"{choice.bits} bits"]
    if t5:
        quantized = t5 == "kept" and choice.text_bits < 16
        words.append(f"T5 in {choice.text_bits}" if quantized else f"T5 {t5}")
    words.append(RESIDENCY_TEXT[choice.residency])
    words.append("decoded whole" if choice.tiles == 1 else f"decoded in tiles, {choice.tiles} a side")
    words.append(f"{choice.batch} at a time")
    return ", ".join(words)


def format_bytes(count: float) -> str:
    """Format a number of bytes in GiB, or in MiB below one GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def required_bytes(plan: Plan) -> int:
    """Return the total memory in bytes that the GPU or this process must have."""
    return int(plan.peak * (1 + (FRAGMENTS if plan.gpu else 0))) + plan.base


def choices(constraints: PlanConstraints) -> Iterator[ExecutionConfig]:
    """Yield all configurations, the preferred first."""
    batches = [constraints.batch]
    while batches[-1] > 1:
        batches.append(-(-batches[-1] // 2))
    for bits, text_bits, tiles, residency, batch in product(
        constraints.bits, constraints.text_bits, TILES, RESIDENCIES, batches
    ):
        yield ExecutionConfig(bits, text_bits, tiles, residency, batch)


def choose(
    constraints: PlanConstraints,
    stages: Callable[[ExecutionConfig], Mapping[str, int]],
    limit: int,
    base: int,
) -> Plan:
    """Return the first configuration of :func:`choices` that fits, as a plan.

    Args:
        constraints: device, candidates and workload.
        stages: returns the bytes on the device by stage for a configuration.
        limit: memory limit in bytes.
        base: bytes of the limit that are in use before the model.

    Raises:
        UserError: none fits. The line says the smallest limit that works.
    """
    least: Plan | None = None
    for choice in choices(constraints):
        plan = Plan(choice, stages(choice), base, limit, constraints.gpu)
        if required_bytes(plan) <= limit:
            return plan
        if least is None or required_bytes(plan) < required_bytes(least):
            least = plan
    assert least is not None
    how = describe_config(least.config, "kept" if len(constraints.text_bits) > 1 else "")
    raise UserError(
        f"--memory {format_bytes(limit)} is not enough: the least that works here is "
        f"{_round_up(required_bytes(least))} ({how}), "
        f"{format_bytes(base)} of it before the model"
    )


def _round_up(count: int) -> str:
    """Format a size for ``--memory``, rounded up so that it suffices."""
    return f"{-(-count // 2**20)}MiB" if count < GIB else f"{-(-count * 100 // GIB) / 100:.2f}GiB"
