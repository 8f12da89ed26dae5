"""The numbers of the protocol: they are fixed before the runs, and every result file records them."""

from __future__ import annotations

from dataclasses import dataclass

TEST_SEED = 10_000_000
"""Seed of the first image that is measured for a table."""

VALIDATION_SEED = 20_000_000
"""Seed of the first image that is measured for a choice, such as that of a rate."""

SWEEP = 9
"""The replicate that rates are chosen on: its samples and its warm start belong to no table."""


@dataclass(frozen=True)
class Protocol:
    """Sizes of the experiment.

    Attributes:
        images: images per measurement in a table; the test set has as many.
        curve_images: images per measurement along a curve, and in a sweep.
        teacher_steps: solver steps of the teacher, in its samples and in the tables.
        guidance: its guidance scale.
        samples: teacher samples per replicate.
        warm_updates: updates of a warm start.
        warm_batch: its batch size.
        warm_rate: its learning rate.
        updates: updates of a method.
        sweep_updates: updates of a method in the sweep.
        batch: batch size of methods.
        rising: updates in which the learning rate rises; it is constant from there.
        curve: updates at which a curve is measured.
    """

    images: int = 10_000
    curve_images: int = 2_500
    teacher_steps: int = 16
    guidance: float = 1.5
    samples: int = 5_000
    warm_updates: int = 2_000
    warm_batch: int = 64
    warm_rate: float = 5e-4
    updates: int = 600
    sweep_updates: int = 100
    batch: int = 32
    rising: int = 20
    curve: tuple[int, ...] = (100, 200, 400)

    @property
    def keep_every(self) -> int:
        """Updates between the students that are kept."""
        return min(100, self.updates, self.sweep_updates)
