"""Mean pairwise distance against SciPy-free arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate.metrics.diversity import diversity


def test_by_hand() -> None:
    features = np.array([[[0.0, 0], [3, 4], [0, 4]], [[1, 1], [1, 1], [1, 1]]])
    assert diversity(features) == pytest.approx([(5 + 4 + 3) / 3, 0])


def test_scales_and_does_not_depend_on_order_or_place() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((5, 4, 8))
    assert diversity(3 * features) == pytest.approx(3 * diversity(features))
    assert diversity(features[:, ::-1] + 10) == pytest.approx(diversity(features))


def test_normal_in_many_dimensions() -> None:
    features = np.random.default_rng(1).standard_normal((50, 4, 2000))
    assert diversity(features).mean() == pytest.approx(np.sqrt(2 * 2000), rel=0.01)


def test_one_seed_has_no_distance() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        diversity(np.zeros((3, 1, 2)))
