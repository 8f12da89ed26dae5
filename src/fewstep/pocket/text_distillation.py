"""Distillation of a sentence encoder into Pocket's small text encoders.

Each encoder learns to predict the embedding that the sentence encoder gives a caption, and the caption's
labels: concepts, styles and background colours. The two CLIPs together also predict the image's latents.
Their best prediction is the mean over all images of that caption, E[x_0 | caption]. This is what the
velocity needs in the step from pure noise, where v = eps - E[x_0 | caption].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    import torch

    from fewstep.pocket.text_encoder import TextEncodersWithHeads

LATENT_WEIGHT = 10.0
"""Weight of the squared error of the predicted latents."""


@dataclass(frozen=True)
class TextBatch:
    """Captions with their targets.

    Attributes:
        ids: token ids for each encoder, int64 ``[B, L]``; T5 may get only the first rows.
        embedding: unit embeddings of the sentence encoder, ``[B, M]``.
        labels: multi-hot over concepts, styles and background colours, ``[B, K]``.
        has_labels: 1 where the labels are known, else 0, ``[B]``.
        latents: the image's latents, cut into cells, ``[B, N, V]``.
        has_image: 1 where the caption has an image, else 0, ``[B]``.
    """

    ids: Sequence[torch.Tensor]
    embedding: torch.Tensor
    labels: torch.Tensor
    has_labels: torch.Tensor
    latents: torch.Tensor
    has_image: torch.Tensor


@dataclass(frozen=True)
class TextEncoderDistillation:
    """Train all encoders at once, each through prediction heads that are discarded afterwards.

    Attributes:
        student: the encoders with their heads.
    """

    student: TextEncodersWithHeads

    @property
    def nets(self) -> dict[str, TextEncodersWithHeads]:
        return {"student": self.student}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("student", self.losses)]

    def losses(self, batch: TextBatch, draw: StepRandom) -> Losses:
        """Return three losses, weighted to be of similar size at the start of training.

        They are the cosine distance to the embedding and the binary cross-entropy of the labels, both
        averaged over the heads, and the squared error of the predicted latents.
        """
        import torch.nn.functional as F

        outputs, cells = self.student(batch.ids)
        embedding_loss: Any = 0.0
        label_loss: Any = 0.0
        for output in outputs:
            n = len(output.embedding)
            embedding_loss += 1 - F.cosine_similarity(output.embedding, batch.embedding[:n]).mean()
            cross_entropy = F.binary_cross_entropy_with_logits(
                output.label_logits, batch.labels[:n], reduction="none"
            ).sum(1)
            label_loss += (cross_entropy * batch.has_labels[:n]).mean()
        errors = ((cells - batch.latents) ** 2).mean((1, 2))
        latent_loss = (errors * batch.has_image).sum() / batch.has_image.sum().clamp(min=1)
        return {
            "meaning": 4 * embedding_loss / len(outputs),
            "truth": label_loss / len(outputs),
            "picture": LATENT_WEIGHT * latent_loss,
        }
