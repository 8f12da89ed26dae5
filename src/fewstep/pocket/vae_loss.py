"""The training loss of Pocket's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class AutoencoderTraining:
    """Train an autoencoder on reconstruction errors and the KL divergence of its posterior.

    The reconstruction errors are those of pixels, of pixel differences and of local colour means.

    Attributes:
        vae: a diffusers ``AutoencoderKL``.
        decoder_only: keeps the encoder frozen.
        edges: weight of the absolute error of differences between neighbouring pixels.
        colour: weight of the error of 8 x 8 means. Without it, rare hues are learnt last.
        divergence: weight of the KL divergence from a unit normal, averaged over latent elements. A small
            weight suffices to bound the latents' scale (Rombach et al., arXiv 2112.10752, section G).
    """

    vae: Any
    decoder_only: bool = False
    edges: float = 0.5
    colour: float = 2.0
    divergence: float = 1e-3

    @property
    def nets(self) -> dict[str, Module]:
        return {"vae": self.vae}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("vae", self.losses)]

    def losses(self, images: Tensor, draw: StepRandom) -> Losses:
        """Return the weighted losses of ``images``, ``[B, 3, h, w]`` in [-1, 1]."""
        import torch

        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.vae.encode(images).latent_dist
        error = self.vae.decode(posterior.mean + posterior.std * draw.noise(posterior.mean)).sample - images
        horizontal = (error[..., 1:] - error[..., :-1]).abs().mean()
        vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        local_mean = torch.nn.functional.avg_pool2d(error, 8)
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {
            "absolute": error.abs().mean(),
            "square": (error**2).mean(),
            "edges": self.edges * (horizontal + vertical),
            "colour": self.colour * (local_mean.abs().mean() + 2 * local_mean.square().mean()),
            "divergence": self.divergence * divergence,
        }
