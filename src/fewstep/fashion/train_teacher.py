"""Train the teacher of the Fashion-MNIST benchmark by flow matching."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import Batch, BatchSlice, Cond, UserError
from fewstep.core.validate import require_fraction, require_positive
from fewstep.fashion import data as fashion
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.nn import Module

    from fewstep.families.base import Family

PATCH = 4
HEAD = 16
"""Width of an attention head."""

SHIFT = 3.0
"""Time shift of the sampling grid, SD3's: four steps start at 1, .9, .75 and .5."""


def fashion_teacher(
    *,
    data: Path = Path("data/fashion"),
    output: OutputFolder = Path("runs/fashion-teacher"),
    width: int = 64,
    layers: int = 6,
    steps: int = 14_000,
    batch_size: int = 128,
    lr: float = 1.5e-3,
    drop_class: float = 0.1,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train a class-conditional DiT on the pixels of Fashion-MNIST.

    Args:
        data: The data set, of `fewstep data fashion`.
        output: Run folder; the model is written to its subfolder `model` as a diffusers folder.
        width: Width of the net, a multiple of 16.
        layers: Transformer blocks.
        steps: Training steps.
        batch_size: Images per step.
        lr: Learning rate.
        drop_class: Share of the images without their class, for classifier-free guidance.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(steps, lr, decay=0.4, **asdict(compute), ema=0.999, precision="fp32")
    require_positive(width=width, layers=layers, batch_size=batch_size)
    require_fraction(drop_class=drop_class)
    if width % HEAD:
        raise UserError(f"--width must be a multiple of {HEAD}, not {width}")

    import torch

    from fewstep.core import schedule
    from fewstep.data import sampler
    from fewstep.fashion.judge import pixels
    from fewstep.methods.flow_matching import FlowMatching

    training = fashion.load(data, "train")
    family = new_teacher(width, layers, compute.seed)

    def batches(step: int, part: BatchSlice) -> Batch:
        rows = sampler.batch_indices(len(training), step, batch_size, compute.seed)
        rng = np.random.Generator(np.random.Philox(key=[compute.seed, step]))
        labels = np.where(rng.random(batch_size) < drop_class, len(fashion.CLASSES), training.labels[rows])
        own = part.slice_of(batch_size)
        context = torch.from_numpy(labels[own]).float().reshape(-1, 1, 1)
        cond = Cond(context, context.new_zeros(len(context), 0))
        return Batch(pixels(training.images[rows[own]]), cond)

    def finish(nets: dict[str, Module]) -> None:
        family.save(output / "model")

    about = {
        "recipe": "fashion-teacher",
        "data": str(data),
        "batch": batch_size,
        "drop_class": drop_class,
        "made_of": {"width": str(width), "layers": str(layers)},
    }
    method = FlowMatching(family.net, family.velocity, schedule.logit_normal)
    return Run(
        "fashion-teacher",
        output,
        method,
        batches,
        options,
        about,
        preview=lambda nets: _sheet(family),
        finish=finish,
        bodies=[family],
    )


def new_teacher(width: int, layers: int, seed: int) -> Family:
    """Return an untrained teacher; its blocks begin as identities (adaLN-Zero, arXiv 2212.09748)."""
    import torch
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from fewstep.families.dit import ARCHITECTURE

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: Any = DiTTransformer2DModel(
            num_attention_heads=width // HEAD,
            attention_head_dim=HEAD,
            in_channels=1,
            out_channels=1,
            num_layers=layers,
            sample_size=fashion.SIDE,
            patch_size=PATCH,
            num_embeds_ada_norm=len(fashion.CLASSES),
        )
    with torch.no_grad():
        for layer in (*(block.norm1.linear for block in net.transformer_blocks), net.proj_out_2):
            layer.weight.zero_()
            layer.bias.zero_()
    parts = {"transformer": net, "scheduler": FlowMatchEulerDiscreteScheduler(shift=SHIFT)}
    return ARCHITECTURE.assemble(parts, name="fashion-teacher", classes=fashion.CLASSES)


def _sheet(family: Family) -> Image:
    """Return a contact sheet of all classes."""
    from fewstep.fashion.sampling import sample
    from fewstep.images.grid import sheet

    images = sample(family, count=len(fashion.CLASSES), steps=16, guidance=2.0, seed=0).images
    return sheet(images[:, None].repeat(3, 1), fashion.CLASSES, columns=4)
