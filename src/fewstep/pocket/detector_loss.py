"""The training loss of the scene detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.methods.base import Losses, StepRandom, Update

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

    from fewstep.pocket.detector_net import Detector


@dataclass(frozen=True)
class DetectionBatch:
    """Images with the detector's targets.

    Attributes:
        images: float32 ``[B, 3, h, w]`` in 0..255.
        heat: target of the heat map, ``[B, 1, H, W]``: 1 at the cell of every centre, less around it.
        cells: the cells of the N centres as ``b * H * W + row * W + column``, int64 ``[N]``.
        boxes: offset of the centre from its cell's (x, y; in cells) and log of the side, ``[N, 3]``.
    """

    images: torch.Tensor
    heat: torch.Tensor
    cells: torch.Tensor
    boxes: torch.Tensor


@dataclass(frozen=True)
class DetectorTraining:
    """Train the detector with a focal loss on the heat map and an absolute error on the boxes.

    Source: Zhou, Wang and Krähenbühl, arXiv 1904.07850, equation 1.

    Attributes:
        net: the detector.
        heat: weight of the focal loss.
        box: weight of the boxes' error.
    """

    net: Detector
    heat: float = 1.0
    box: float = 1.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"net": self.net}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("net", self.losses)]

    def losses(self, batch: DetectionBatch, draw: StepRandom) -> Losses:
        """Return the weighted losses. The error of boxes counts at the objects' centres alone."""
        import torch

        images = batch.images.contiguous(memory_format=torch.channels_last)
        heat, box = self.net.maps(images)
        predicted = box.permute(0, 2, 3, 1).flatten(0, 2)[batch.cells].float()
        return {
            "heat": self.heat * _focal(heat.float(), batch.heat) / len(batch.cells),
            "box": self.box * (predicted - batch.boxes).abs().mean(),
        }


def _focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the summed focal loss, alpha 2 and beta 4. False peaks near a centre cost little."""
    import torch
    import torch.nn.functional as F

    probability = torch.sigmoid(logits)
    is_centre = (target == 1).float()
    positive = -F.logsigmoid(logits) * (1 - probability) ** 2 * is_centre
    negative = -F.logsigmoid(-logits) * probability**2 * (1 - target) ** 4 * (1 - is_centre)
    return (positive + negative).sum()
