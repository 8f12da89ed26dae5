"""Options of PyTorch inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from cyclopts import Parameter

Bits = Literal[32, 16, 8, 4]
Device = Literal["auto", "cpu", "cuda"]


@Parameter(name="*")
@dataclass(frozen=True)
class TorchOptions:
    """How a PyTorch model runs.

    Attributes:
        student: A distilled student of the model: a run folder, a diffusers folder, or a LoRA.
        lora: A LoRA to add to the model, as FILE or FILE:WEIGHT; repeat the option for more.
        memory: Memory limit, such as 8GiB, of the GPU, or of this process on a CPU. [default: no limit]
        bits: Bits per weight of the net: 32, 16, 8 or 4. [default: the fastest on the device that fits]
        tiny_decoder: A folder with a tiny autoencoder (TAESD3) for decoding.
        size: Image size in pixels, such as 768 or 1344x768 (width first). [default: the model's own]
        device: auto, cpu or cuda.
        compile: Compile text encoders, net and decoder, and on a GPU capture CUDA graphs. The first image
            then takes a minute longer.
        batch: Images per batch, for which memory is planned.
        image: Whether memory is planned for image-to-image.
    """

    student: Annotated[str | None, Parameter(metavar="MODEL")] = None
    lora: Annotated[tuple[str, ...], Parameter(metavar="FILE")] = ()
    memory: Annotated[str | None, Parameter(metavar="SIZE")] = None
    bits: Bits | None = None
    tiny_decoder: Annotated[str | None, Parameter(metavar="PATH")] = None
    size: Annotated[str | None, Parameter(metavar="SIZE")] = None
    device: Device = "auto"
    compile: Annotated[bool, Parameter(negative="")] = False
    batch: Annotated[int, Parameter(parse=False)] = 1
    image: Annotated[bool, Parameter(parse=False)] = False

    def named(self) -> list[str]:
        """Return the options that differ from their defaults, as named on the command line."""
        defaults = TorchOptions(batch=self.batch, image=self.image)
        names = ("student", "lora", "memory", "bits", "tiny_decoder", "size", "device", "compile")
        return [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) != getattr(defaults, n)]


class TorchOptionsDict(TypedDict, total=False):
    """The fields of :class:`TorchOptions`, as keyword arguments."""

    student: str | Path | None
    lora: str | Path | Sequence[str | Path | tuple[str | Path, float]]
    memory: str | None
    bits: Bits | None
    tiny_decoder: str | Path | None
    size: str | None
    device: Device
    compile: bool
    batch: int
    image: bool
