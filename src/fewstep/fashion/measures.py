"""Measures of Fashion-MNIST images: distances to real ones by several views, accuracy, precision, recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fewstep.evaluate.metrics.frechet import Moments, frechet, moments
from fewstep.fashion.data import LabelledImages
from fewstep.fashion.judge import BATCH, Judge, pixels

COMPONENTS = 100
"""Principal components of pixels that are compared."""

NEIGHBOURS = 3
MOST_NEIGHBOURS = 5000
"""Neighbours, and images per side, of precision and recall."""

BLOCKS = 20
"""Blocks of images that the jackknife leaves out, one at a time."""


@dataclass(frozen=True)
class Views:
    """What is compared of a set of images.

    Attributes:
        judge: features of the judge, ``[N, 64]``.
        components: principal components of the pixels, ``[N, 100]``.
        untrained: features of untrained convolutions, ``[N, 64]``.
        classes: the judge's classes, ``[N]``.
        energy: mean square of what a 3 x 3 mean removes, over the images' pixels in [-1, 1].
    """

    judge: NDArray[np.float32]
    components: NDArray[np.float32]
    untrained: NDArray[np.float32]
    classes: NDArray[np.int64]
    energy: float

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Mean and covariance by the name of the distance."""
        return {
            "frechet": moments(self.judge),
            "frechet_pixels": moments(self.components),
            "frechet_untrained": moments(self.untrained),
        }


@dataclass(frozen=True)
class Viewer:
    """Makes views of images.

    Attributes:
        judge: the judge.
        mean: of the training images' pixels, ``[784]``.
        basis: principal components of the training images, ``[784, 100]``.
    """

    judge: Judge
    mean: NDArray[np.float32]
    basis: NDArray[np.float32]

    @classmethod
    def fit(cls, judge: Judge, training: LabelledImages) -> Viewer:
        """Return a viewer with the principal components of the training images."""
        flat = _flat(training.images).astype(np.float64)
        mean = flat.mean(0)
        covariance = (flat - mean).T @ (flat - mean) / len(flat)
        _, vectors = np.linalg.eigh(covariance)
        return cls(judge, mean.astype(np.float32), vectors[:, ::-1][:, :COMPONENTS].astype(np.float32))

    def __call__(self, images: NDArray[np.uint8]) -> Views:
        """Return the views of images, uint8 ``[N, 28, 28]``."""
        features, classes = self.judge.judge(images)
        components = ((_flat(images) - self.mean) @ self.basis).astype(np.float32)
        return Views(features, components, _untrained(images), classes, _energy(images))


@dataclass(frozen=True)
class Figure:
    """A figure with its standard error over the images; the error is ``None`` where it was not estimated."""

    value: float
    error: float | None = None


def measure(views: Views, labels: NDArray[np.int64], real: Views, teacher: Views | None) -> dict[str, Figure]:
    """Return the figures of a model's images.

    Args:
        views: of its images.
        labels: the classes that were asked for, ``[N]``.
        real: views of the test images.
        teacher: views of the teacher's images, if it is compared with.

    Returns:
        ``frechet``, ``frechet_pixels`` and ``frechet_untrained``, the Fréchet distances to the real images;
        ``frechet_teacher``, the judge's distance to the teacher's; ``accuracy``, the share of images that the
        judge gives the class asked for; ``precision`` and ``recall`` (Kynkäänniemi et al., arXiv 1904.06991);
        ``diversity``, the mean distance between features within a class over that of real images; ``energy``.
    """
    figures: dict[str, Figure] = {}
    for name, own in views.moments.items():
        figures[name] = Figure(frechet(own, real.moments[name]))
    figures["frechet"] = Figure(figures["frechet"].value, _jackknife_error(views, real))
    if teacher is not None:
        figures["frechet_teacher"] = Figure(frechet(views.moments["frechet"], teacher.moments["frechet"]))
    right = (views.classes == labels).astype(np.float64)
    figures["accuracy"] = Figure(float(right.mean()), float(right.std() / len(right) ** 0.5))
    precision, recall = precision_recall(real.judge[:MOST_NEIGHBOURS], views.judge[:MOST_NEIGHBOURS])
    figures["precision"], figures["recall"] = Figure(precision), Figure(recall)
    figures["diversity"] = Figure(_within(views.judge, views.classes) / _within(real.judge, real.classes))
    figures["energy"] = Figure(views.energy)
    return figures


def precision_recall(
    real: NDArray[np.floating], fake: NDArray[np.floating], neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equation 2).

    Precision is the share of fake features within the neighbourhood of a real one, recall the reverse. The
    neighbourhood of a feature reaches to its k-th nearest neighbour of the same set.

    Args:
        real: features ``[N, d]``.
        fake: features ``[M, d]``.
        neighbours: k.
    """
    apart = _squares(real, fake)
    near_real = _reach(real, neighbours)[:, None] >= apart
    near_fake = _reach(fake, neighbours)[None] >= apart
    return float(near_real.any(0).mean()), float(near_fake.any(1).mean())


def as_json(figures: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    """Return figures as JSON holds them."""
    return {
        name: {"value": figure.value} | ({} if figure.error is None else {"error": figure.error})
        for name, figure in figures.items()
    }


def _jackknife_error(views: Views, real: Views) -> float:
    """Return the delete-one-block standard error of the judge's distance."""
    features = views.judge.astype(np.float64)
    # Blocks of neighbours hold all classes alike: classes come in turn.
    blocks = np.array_split(features, BLOCKS)
    sums, squares = np.array([each.sum(0) for each in blocks]), np.array([each.T @ each for each in blocks])
    without = np.zeros(BLOCKS)
    for left in range(BLOCKS):
        count = len(features) - len(blocks[left])
        mean = (sums.sum(0) - sums[left]) / count
        covariance = (squares.sum(0) - squares[left] - count * np.outer(mean, mean)) / (count - 1)
        without[left] = frechet((mean, covariance), real.moments["frechet"])
    return float(np.sqrt((BLOCKS - 1) * without.var()))


def _within(features: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Return the mean over classes of the root mean square distance between two features of one class."""
    spreads = [np.sqrt(2 * features[classes == own].var(0).sum()) for own in np.unique(classes)]
    return float(np.mean(spreads))


def _reach(features: NDArray[np.floating], neighbours: int) -> NDArray[np.float32]:
    """Return the squared distance of each feature to its k-th nearest neighbour, ``[N]``."""
    return np.partition(_squares(features, features), neighbours, axis=1)[:, neighbours]


def _squares(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return squared distances, ``[N, M]``."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return np.maximum(squares, np.float32(0))


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1


def _energy(images: NDArray[np.uint8]) -> float:
    from torch.nn.functional import avg_pool2d

    x = pixels(images)
    return float((x - avg_pool2d(x, 3, 1, 1, count_include_pad=False)).square().mean())


@torch.no_grad()
def _untrained(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return means and deviations of 32 maps of untrained convolutions, ``[N, 64]``."""
    from torch.nn.functional import conv2d, relu

    generator = torch.Generator().manual_seed(0)
    shapes = ((32, 1, 3, 3), (32, 32, 3, 3))
    weights = [
        torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        for shape in shapes
    ]
    parts: list[NDArray[np.float32]] = []
    for start in range(0, len(images), BATCH):
        x = pixels(images[start : start + BATCH])
        for index, weight in enumerate(weights):
            x = relu(conv2d(x, weight, padding=1, stride=1 + index))
        parts.append(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1).numpy())
    return np.concatenate(parts)
