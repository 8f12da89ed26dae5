"""Images of a class-conditional model, for measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core import signals
from fewstep.fashion.data import CLASSES

if TYPE_CHECKING:
    from fewstep.core.types import Velocity
    from fewstep.families.base import Family

BATCH = 250


@dataclass(frozen=True)
class Samples:
    """Images, uint8 ``[N, 28, 28]``, and the classes that were asked for, ``[N]``."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def sample(
    family: Family,
    *,
    count: int,
    steps: int,
    guidance: float | None,
    seed: int,
    check: Callable[[], None] = signals.check,
) -> Samples:
    """Sample a model, the classes in turn; image ``i`` starts from the noise of seed ``seed + i``.

    Args:
        family: the model; its sampler is used.
        count: number of images.
        steps: solver steps.
        guidance: guidance scale; ``None`` for a net without a second pass.
        seed: of the first image.
        check: called before each batch; it may raise to stop.
    """
    import torch

    from fewstep.core import sampling, schedule
    from fewstep.core.guidance import Guided
    from fewstep.images.pixels import to_uint8

    velocity: Velocity = family.velocity
    if guidance is not None:
        velocity = Guided(family.velocity, family.text([""]), guidance)
    labels = np.arange(count) % len(CLASSES)
    grid, images = schedule.grid(steps, family.shift), list[NDArray[np.uint8]]()
    for start in range(0, count, BATCH):
        check()
        rows = range(start, min(start + BATCH, count))
        cond = family.text([CLASSES[labels[row]] for row in rows])
        with torch.no_grad():
            latents: Any = sampling.generate_latents(
                family, cond, [seed + row for row in rows], grid, velocity=velocity
            )
            images.append(to_uint8(family.codec.decode(latents))[:, 0])
    return Samples(np.concatenate(images), labels)
