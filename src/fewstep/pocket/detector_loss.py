"""The detector of the scene score: where things are, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods.base import Losses, StepRandom, Update


@dataclass(frozen=True)
class Pictures:
    """Pictures and their things.

    Attributes:
        images: float32 ``[B, 3, h, w]`` in 0..255.
        heat: 1 at the cell of every centre, falling off around it, ``[B, 1, H, W]``.
        cells: the cells of the N centres as ``b * H * W + row * W + column``, int64 ``[N]``.
        boxes: offset of the centre from its cell's (x, y; in cells) and log of the side, ``[N, 3]``.
    """

    images: Any
    heat: Any
    cells: Any
    boxes: Any


@dataclass(frozen=True)
class DetectorTraining:
    """The focal loss of the heat (arXiv 1904.07850, equation 1) and the error of boxes.

    Attributes:
        net: a :class:`fewstep.pocket.detector_net.Detector`.
        heat: weight of the heat's loss.
        box: weight of the boxes' absolute error.
    """

    net: Any
    heat: float = 1.0
    box: float = 1.0

    @property
    def nets(self) -> dict[str, Any]:
        return {"net": self.net}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("net", self.losses)]

    def losses(self, batch: Pictures, draw: StepRandom) -> Losses:
        """Boxes are learnt at the centres alone."""
        import torch

        images = batch.images.contiguous(memory_format=torch.channels_last)
        heat, box = self.net.maps(images)
        seen = box.permute(0, 2, 3, 1).flatten(0, 2)[batch.cells].float()
        return {
            "heat": self.heat * _focal(heat.float(), batch.heat) / len(batch.cells),
            "box": self.box * (seen - batch.boxes).abs().mean(),
        }


def _focal(logits: Any, target: Any) -> Any:
    """Penalty-reduced focal loss, alpha 2 and beta 4, summed; near a centre a false peak costs little."""
    import torch
    import torch.nn.functional as F

    chance = torch.sigmoid(logits)
    there = (target == 1).float()
    hit = -F.logsigmoid(logits) * (1 - chance) ** 2 * there
    miss = -F.logsigmoid(-logits) * chance**2 * (1 - target) ** 4 * (1 - there)
    return (hit + miss).sum()
