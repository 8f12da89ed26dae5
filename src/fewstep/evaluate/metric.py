"""The interface of a metric, and the data that metrics read.

A metric is a class in one file. It says in ``needs`` what it reads besides the pixels:

==============  ==================================================================================
need            what the run then does
==============  ==================================================================================
``features``    fills ``ImageBatch.features`` (and those of the references)
``references``  passes the real images of the prompt set to the constructor, as `References`
``truth``       measures only prompt sets where every prompt has a ``truth``
``teacher``     measures only runs with a teacher, whose figures come from ``compare``
==============  ==================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fewstep.core import plugins
from fewstep.core.stats import Interval
from fewstep.core.types import UserError

FEATURES, REFERENCES, TRUTH, TEACHER = "features", "references", "truth", "teacher"
NEEDS = frozenset({FEATURES, REFERENCES, TRUTH, TEACHER})


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt. All images of a prompt come with the same object, so it may be a key of a dictionary.

    Attributes:
        text: what the model gets.
        truth: what an image of it should show. The built-in metrics read a hashable label; a metric of your
            own may read anything.
        split: the part of the prompt set it belongs to, such as ``held_out``. Some figures are per split.
    """

    text: str
    truth: Any = None
    split: str = ""


@dataclass(frozen=True, eq=False)
class Reference:
    """One real image, uint8 ``[3, h, w]`` RGB; ``truth`` and ``split`` as for a `Prompt`."""

    image: NDArray[np.uint8]
    truth: Any = None
    split: str = ""


@dataclass(frozen=True)
class ImageBatch:
    """Images and their features.

    Attributes:
        pixels: uint8 ``[B, 3, h, w]`` RGB.
        features: float32 ``[B, d]``; ``[B, 0]`` where no metric needs features.
    """

    pixels: NDArray[np.uint8]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class References:
    """The real images of a prompt set and their features, float32 ``[M, d]`` (``[M, 0]`` without)."""

    images: Sequence[Reference]
    features: NDArray[np.float32]


class Metric(Protocol):
    """Measures the images of one model. A run makes one object per model."""

    def update(self, images: ImageBatch, prompts: Sequence[Prompt]) -> None:
        """Take the next images, one of each of ``prompts``; the images of a prompt follow each other."""
        ...

    def compute(self) -> Mapping[str, Interval]:
        """Return figures by name, each with its interval; none where there is too little to measure."""
        ...


@runtime_checkable
class ComparesToTeacher(Protocol):
    """A metric that has figures of a model against the teacher, too."""

    def compare(self, teacher: Any) -> Mapping[str, Interval]:
        """Return figures against the teacher's metric, which has seen the same prompts and seeds."""
        ...


class MetricFactory(Protocol):
    """Makes metrics: the class of a metric, or another callable with ``needs``."""

    @property
    def needs(self) -> frozenset[str]:
        """The data that the metric reads besides the pixels, of `NEEDS`."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Metric:
        """Return a metric that has seen no image; gets the `References` where it needs them."""
        ...


def load(spec: str) -> MetricFactory:
    """Return the metric that ``spec`` names.

    Args:
        spec: a module of ``fewstep.evaluate.metrics``, an import path ``package.module:Class``, or an entry
            point of the group ``fewstep.metric``. A module stands for its attribute ``METRIC``.

    Raises:
        UserError: there is no such metric, or it has not the interface of one.
    """
    found = plugins.load(spec, "fewstep.evaluate.metrics", "metric")
    factory = getattr(found, "METRIC", None) if isinstance(found, ModuleType) else found
    needs = getattr(factory, "needs", None)
    if not callable(factory) or not isinstance(needs, frozenset) or not needs <= NEEDS:
        raise UserError(f"{spec} is no metric: it must be a class with needs, a frozenset of {sorted(NEEDS)}")
    if inspect.isclass(factory) and not all(hasattr(factory, name) for name in ("update", "compute")):
        raise UserError(f"{spec} is no metric: it must have the methods update and compute")
    return factory  # type: ignore[return-value]
