"""A small detector of things on a plain ground: where they are and how large, not what (floor 2, torch).

After CenterNet (Zhou, Wang and Krähenbühl, *Objects as Points*, arXiv 1904.07850): a thing is a peak of a
heat map, and its box is read at the peak.
"""

from __future__ import annotations

import torch
from torch import nn

STRIDE = 8
"""Pixels of the picture a cell of the maps, either way."""


class Detector(nn.Module):
    """Pictures to maps of cells, three quarters of a million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.PixelUnshuffle(4), _conv(48, 32), _conv(32, 64, 2), _Block(64))
        self.coarse = nn.Sequential(_conv(64, 96, 2), _Block(96), _Block(96), _Block(96))
        self.across, self.up = nn.Conv2d(64, 64, 1), nn.Conv2d(96, 64, 1)
        self.joined = _conv(64, 64)
        self.heat, self.box = nn.Conv2d(64, 1, 1), nn.Conv2d(64, 3, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -4.0)  # few cells are centres

    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, 3, h, w]`` in 0..255 -> logits of the heat ``[B, 1, H, W]`` and boxes ``[B, 3, H, W]``.

        A box is the offset of its centre from the cell's (x, y; in cells), and the log of its side in units
        of the picture's.
        """
        fine = self.fine(images / 64 - 2)
        wide = nn.functional.interpolate(self.up(self.coarse(fine)), scale_factor=2.0, mode="bilinear")
        joined = self.joined(torch.relu(self.across(fine) + wide))
        return self.heat(joined), self.box(joined)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the graph has it: heat in 0..1, and boxes."""
        heat, box = self.maps(images)
        return torch.sigmoid(heat), box


class _Block(nn.Module):
    """A residual block of two 3 x 3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


def _conv(wide: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )
