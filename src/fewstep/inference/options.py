"""SD3.5 and FLUX on PyTorch within a given memory: parts come to the device when their turn is.

``outline`` is what configurations say of a model, and ``student`` what is laid over it. ``held`` and
``rehearse`` find by shapes what parts and ``stages`` of a picture hold; ``plan`` chooses. ``parts`` come and
go, and are filled (``fill``) with ``weights``; ``blocks`` and ``again`` make them quick; ``assemble`` makes a
model of them, and ``load`` does it all.
"""

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
        student: A few-step student of the model: a run folder, a diffusers folder, or a LoRA.
        lora: A LoRA to add to the model, as FILE or FILE:WEIGHT. Repeat the option for more.
        memory: Memory limit, such as 8GiB: of the GPU, or of this process on a CPU. [default: no limit]
        bits: Bits per weight of the net. [default: the fastest on the device, or the most that fit]
        tiny_decoder: A folder with a tiny autoencoder (TAESD3), which decodes instead of the VAE.
        size: Size in pixels, such as 768 or 1344x768 (width first). [default: the model's own]
        device: Device that runs the model.
        compile: Compile text encoders, net and decoder, and capture CUDA graphs on a GPU. The first image
            then takes a minute longer.
        batch: Batch size of the memory plan.
        image: Whether the memory plan includes an input image.
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
        """Return the options that differ from the defaults, as the command line names them."""
        plain = TorchOptions(batch=self.batch, image=self.image)
        names = ("student", "lora", "memory", "bits", "tiny_decoder", "size", "device", "compile")
        return [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) != getattr(plain, n)]


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
