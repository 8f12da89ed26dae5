"""The autoencoder: sharp pictures through a narrow, gently regularised latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods.base import Losses, StepRandom, Update


@dataclass(frozen=True)
class CodecMethod:
    """Reconstruction in pixels, in edges and in colour, and the posterior's divergence from a unit normal.

    Attributes:
        vae: a diffusers ``AutoencoderKL``.
        decoder_only: the encoder stays as it is.
        edges: weight of the absolute error of pixel differences: stickers are mostly edges.
        colour: weight of the error of 8 x 8 means: without it, rare hues are learnt last
            (purple came out black).
        divergence: weight of the KL divergence (mean over latent elements). Small: it bounds the
            latents' scale, and what a channel does not need turns into noise
            (Rombach et al., arXiv 2112.10752, section G).
    """

    vae: Any
    decoder_only: bool = False
    edges: float = 0.5
    colour: float = 2.0
    divergence: float = 1e-3

    @property
    def nets(self) -> dict[str, Any]:
        return {"vae": self.vae}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("vae", self.losses)]

    def losses(self, images: Any, draw: StepRandom) -> Losses:
        """``images`` ``[B, 3, h, w]`` in [-1, 1]."""
        import torch

        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.vae.encode(images).latent_dist
        error = self.vae.decode(posterior.mean + posterior.std * draw.noise(posterior.mean)).sample - images
        across = (error[..., 1:] - error[..., :-1]).abs().mean()
        down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        coarse = torch.nn.functional.avg_pool2d(error, 8)
        spread = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {
            "absolute": error.abs().mean(),
            "square": (error**2).mean(),
            "edges": self.edges * (across + down),
            "colour": self.colour * (coarse.abs().mean() + 2 * coarse.square().mean()),
            "divergence": self.divergence * spread,
        }
