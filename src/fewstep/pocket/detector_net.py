"""A small class-agnostic detector of objects on a plain background.

It follows CenterNet (Zhou, Wang and Krähenbühl, *Objects as Points*, arXiv 1904.07850): an object is a peak
of a heat map, and its box is predicted at the peak.
"""

from __future__ import annotations

import torch
from torch import nn

STRIDE = 8
"""Pixels per cell of the maps, in height and in width."""


class Detector(nn.Module):
    """Predict a heat map of object centres and a map of boxes. It has 0.75 M weights."""

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
        """Return the logits of the heat map ``[B, 1, H, W]`` and the boxes ``[B, 3, H, W]``.

        A box is the offset of its centre from the cell's centre (x, y; in cells), and the log of its side
        relative to the image's side.

        Args:
            images: ``[B, 3, h, w]`` in 0..255.
        """
        fine = self.fine(images / 64 - 2)
        coarse = nn.functional.interpolate(self.up(self.coarse(fine)), scale_factor=2.0, mode="bilinear")
        joined = self.joined(torch.relu(self.across(fine) + coarse))
        return self.heat(joined), self.box(joined)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the exported graph returns: the heat map in 0..1, and the boxes."""
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


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
