"""The judge of the Fashion-MNIST benchmark: a CNN whose classes and features are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.core.types import UserError
from fewstep.fashion.data import CLASSES

FEATURES = 64
FILE = "judge.safetensors"
BATCH = 100

UNIT = 1.2
"""Fréchet distance of 2,000 training images to the test images, in the judge's features.

It is the mean over the first ten such sets. It sets the scale of the features, so that distances by different
judges are of one size.
"""
UNIT_IMAGES, UNIT_SETS = 2000, 10


class Judge(nn.Module):
    """A CNN of three stages: grey images to features and logits of the ten classes.

    Attributes:
        scale: factor of the features that :meth:`judge` returns.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(1, 32), *_stage(32, 64), nn.MaxPool2d(2),
            *_stage(64, 64), *_stage(64, 128), nn.MaxPool2d(2),
            *_stage(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(FEATURES, len(CLASSES))
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """``[B, 1, 28, 28]`` in [-1, 1] -> ``[B, 64]``."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 1, 28, 28]`` in [-1, 1] -> logits ``[B, 10]``."""
        return self.head(self.dropout(self.features(x)))

    @torch.no_grad()
    def judge(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the features ``[N, 64]`` and the classes ``[N]`` of images, uint8 ``[N, 28, 28]``."""
        features: list[NDArray[np.float32]] = []
        classes: list[NDArray[np.int64]] = []
        device = self.head.weight.device
        for start in range(0, len(images), BATCH):
            x = pixels(images[start : start + BATCH]).to(device, memory_format=torch.channels_last)
            own = self.features(x)
            features.append((self.scale * own).cpu().numpy())
            classes.append(self.head(own).argmax(1).cpu().numpy())
        return np.concatenate(features), np.concatenate(classes)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 ``[B, 28, 28]`` -> float32 ``[B, 1, 28, 28]`` in [-1, 1]."""
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1


def _stage(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.GroupNorm(8, channels_out),
        nn.ReLU(),
    ]


def load(folder: Path) -> Judge:
    """Load a judge from the folder ``model`` of its run, or from that of the run.

    Raises:
        UserError: there is none, or it is broken.
    """
    from safetensors.torch import load_file

    path = folder / FILE if (folder / FILE).is_file() else folder / "model" / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no judge: fewstep train fashion-judge --output {folder}")
    net = Judge()
    try:
        net.load_state_dict(load_file(path))
    except Exception as error:  # of safetensors and torch
        raise UserError(f"{path} is no judge ({str(error).splitlines()[0][:120]})") from error
    net.eval().requires_grad_(False)
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net
