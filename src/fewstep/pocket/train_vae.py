"""Train Pocket's autoencoder, whose latents of a 128 px image are 16 x 16 x 16."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


CROP = 64
"""Side of the training crops, pixels: a convolutional net sees more images per second in small crops."""


def pocket_vae(
    *,
    data: Path = Path("data/stickers"),
    output: OutputFolder = Path("runs/pocket-vae"),
    init: Path | None = None,
    steps: int = 12_000,
    batch_size: int = 8,
    lr: float = 1.5e-3,
    decoder_only: bool = False,
    num_images: int = 9_000,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train Pocket's autoencoder on crops of stickers and scenes.

    Args:
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the autoencoder is written to its subfolder `model`.
        init: Diffusers folder of the autoencoder to start from, instead of random weights.
        steps: Training steps.
        batch_size: Crops per step.
        lr: Learning rate.
        decoder_only: Keep the encoder frozen, so that its latents and what was trained on them stay valid.
        num_images: Number of training images; all are kept in memory.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(
        steps,
        lr,
        decay=0.5,
        **asdict(compute),
        ema=0.998,
        preview_every=1000,
    )
    require_positive(batch_size=batch_size, num_images=num_images)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.pocket import config as pocket
    from fewstep.pocket.assemble import load_vae
    from fewstep.pocket.vae_loss import AutoencoderTraining

    train_images = _load_images(shards.find(data / "train"), num_images)
    preview_images = (
        torch.from_numpy(_load_images(shards.find(data / "heldout"), 24)).float().div(127.5).sub(1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed)
        vae = load_vae(init) if init else pocket.autoencoder()

    def batches(step: int, part: BatchSlice) -> Tensor:
        rng = np.random.Generator(np.random.Philox(key=[compute.seed, step]))
        num_offsets = train_images.shape[-1] - CROP + 1
        indices = rng.integers(0, len(train_images), batch_size)
        tops, lefts = rng.integers(0, num_offsets, (2, batch_size))
        crops = np.stack(
            [
                train_images[index, :, top : top + CROP, left : left + CROP]
                for index, top, left in zip(indices, tops, lefts, strict=True)
            ]
        )
        if rng.random() < 0.5:
            crops = np.ascontiguousarray(crops[..., ::-1])
        return torch.from_numpy(crops[part.slice_of(batch_size)]).float().div(127.5).sub(1)

    def sheet(nets: dict[str, Any]) -> Image:
        from fewstep.images.grid import sheet as image_grid
        from fewstep.images.pixels import to_uint8

        with torch.no_grad():
            vae = nets["vae"]
            decoded = vae(preview_images.to(vae.device), sample_posterior=False).sample.clamp(-1, 1).cpu()
        error = (decoded - preview_images).square().mean((1, 2, 3)) / 4
        labels = ["truth"] * len(preview_images) + [f"{-10 * float(e.log10()):.1f} dB" for e in error]
        images = to_uint8(torch.cat([preview_images, decoded]))
        return image_grid(images, labels, columns=12)

    def finish(nets: dict[str, Any]) -> None:
        vae = nets["vae"]
        images = torch.from_numpy(train_images[:500]).float().div(127.5).sub(1)
        with torch.no_grad():
            latents = torch.cat(
                [vae.encode(chunk.to(vae.device)).latent_dist.mode() for chunk in images.split(20)]
            )
        if not decoder_only:
            vae.register_to_config(
                shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std())
            )
        with replacing_folder(output / "model") as folder:
            vae.save_pretrained(folder)

    about = {"recipe": "pocket-vae", "data": str(data), "batch": batch_size, "decoder_only": decoder_only}
    method = AutoencoderTraining(vae, decoder_only)
    return Run("pocket-vae", output, method, batches, options, about, preview=sheet, finish=finish)


def _load_images(paths: list[Path], count: int) -> NDArray[np.uint8]:
    """Return the first ``count`` images of the shards, uint8 ``[N, 3, h, w]``."""
    from itertools import islice

    from fewstep.data.shards import pixels

    return np.stack([image for image, _ in islice(pixels(paths, 128), count)])
