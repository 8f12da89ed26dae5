"""Pocket's autoencoder: sharp stickers through 16 x 16 x 16 latents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.assemble import MEANS, ComputeOptions, Out
from fewstep.train.run import Run, TrainOptions

CROP = 64
"""Side of the training crops, pixels: small crops show a convolutional net more pictures a second."""


def pocket_vae(
    *,
    data: Path = Path("data/stickers"),
    output: Out = Path("runs/pocket-vae"),
    init: Path | None = None,
    steps: int = 12_000,
    batch_size: int = 8,
    lr: float = 1.5e-3,
    decoder_only: bool = False,
    num_images: int = 9_000,
    means: ComputeOptions = MEANS,
) -> Run:
    """Train Pocket's autoencoder on crops of stickers and scenes.

    Args:
        data: The stickers data set, made by `fewstep data stickers`.
        output: Run folder; the autoencoder is written to its subfolder `model`.
        init: Go on from this autoencoder (a diffusers folder) instead of random weights.
        steps: Updates in all.
        batch_size: Crops an update.
        lr: Learning rate.
        decoder_only: Keep the encoder as it is, so that latents and all that was trained on them stay valid.
        num_images: How many pictures to learn from (held in memory).
        means: How long, and on what.
    """
    options = TrainOptions(
        steps,
        lr,
        decay=0.5,
        **asdict(means),
        ema=0.998,
        preview_every=1000,
    )
    require_positive(batch_size=batch_size, num_images=num_images)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.data import shards
    from fewstep.pocket import config as pocket
    from fewstep.pocket.assemble import load_vae
    from fewstep.pocket.vae_loss import CodecMethod

    seen = _pixels(shards.find(data / "train"), num_images)
    shown = torch.from_numpy(_pixels(shards.find(data / "heldout"), 24)).float().div(127.5).sub(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(means.seed)
        vae = load_vae(init) if init else pocket.autoencoder()

    def batches(step: int, share: BatchSlice) -> Any:
        rng = np.random.Generator(np.random.Philox(key=[means.seed, step]))
        room = seen.shape[-1] - CROP + 1
        places = zip(
            rng.integers(0, len(seen), batch_size), *rng.integers(0, room, (2, batch_size)), strict=True
        )
        crops = np.stack([seen[i, :, y : y + CROP, x : x + CROP] for i, y, x in places])
        if rng.random() < 0.5:
            crops = np.ascontiguousarray(crops[..., ::-1])
        return torch.from_numpy(crops[share.slice_of(batch_size)]).float().div(127.5).sub(1)

    def sheet(nets: dict[str, Any]) -> Any:
        from fewstep.images.grid import sheet as draw
        from fewstep.images.pixels import to_uint8

        with torch.no_grad():
            vae = nets["vae"]
            back = vae(shown.to(vae.device), sample_posterior=False).sample.clamp(-1, 1).cpu()
        error = (back - shown).square().mean((1, 2, 3)) / 4
        labels = ["truth"] * len(shown) + [f"{-10 * float(e.log10()):.1f} dB" for e in error]
        both = to_uint8(torch.cat([shown, back]))
        return draw(both, labels, columns=12)

    def finish(nets: dict[str, Any]) -> None:
        vae = nets["vae"]
        some = torch.from_numpy(seen[:500]).float().div(127.5).sub(1)
        with torch.no_grad():
            latents = torch.cat(
                [vae.encode(part.to(vae.device)).latent_dist.mode() for part in some.split(20)]
            )
        if not decoder_only:
            vae.register_to_config(
                shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std())
            )
        with replacing_folder(output / "model") as folder:
            vae.save_pretrained(folder)

    about = {"recipe": "pocket-vae", "data": str(data), "batch": batch_size, "decoder_only": decoder_only}
    method = CodecMethod(vae, decoder_only)
    return Run("pocket-vae", output, method, batches, options, about, preview=sheet, finish=finish)


def _pixels(paths: list[Path], many: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first ``many`` pictures of the shards, uint8 ``[N, 3, h, w]``."""
    from itertools import islice

    from fewstep.data.shards import pixels

    return np.stack([picture for picture, _ in islice(pixels(paths, 128), many)])
