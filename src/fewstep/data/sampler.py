"""The order of a data set in training, a function of seed and step alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def batch_indices(length: int, step: int, batch: int, seed: int) -> list[int]:
    """Return the rows of training step ``step``: every row once per epoch, in a new order each time.

    Args:
        length: rows of the data set, at least 1.
        step: from 0.
        batch: rows per step; it need not divide ``length``, and may be larger.
        seed: of the orders.
    """
    positions = range(step * batch, (step + 1) * batch)
    return [int(_order(seed, i // length, length)[i % length]) for i in positions]


_orders: dict[tuple[int, int, int], NDArray[np.int64]] = {}  # the last two: a batch may span two epochs


def _order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    if (seed, epoch, length) not in _orders:
        while len(_orders) > 1:
            _orders.pop(next(iter(_orders)))
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        _orders[seed, epoch, length] = rng.permutation(length)
    return _orders[seed, epoch, length]
