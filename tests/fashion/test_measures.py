"""Measures of images hold on sets whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.fashion.data import LabelledImages
from fewstep.fashion.judge import Judge
from fewstep.fashion.measures import Viewer, measure, precision_recall

RNG = np.random.default_rng(0)


def test_a_set_covers_itself() -> None:
    x = RNG.standard_normal((200, 4))
    assert precision_recall(x, x) == (1.0, 1.0)


def test_sets_far_apart_share_nothing() -> None:
    x, y = RNG.standard_normal((100, 4)), 50 + RNG.standard_normal((120, 4))
    assert precision_recall(x, y) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    """A generator that draws one of two modes makes no wrong image, and misses half of the real ones."""
    one, other = RNG.standard_normal((300, 2)), 100 + RNG.standard_normal((300, 2))
    precision, recall = precision_recall(np.concatenate([one, other]), RNG.standard_normal((300, 2)))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_a_spread_of_zero_reaches_nobody_and_is_reached() -> None:
    """Identical fakes have neighbourhoods of no size: their recall is 0."""
    real, fake = RNG.standard_normal((100, 2)), np.zeros((50, 2))
    assert precision_recall(real, fake)[1] == 0.0


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    torch.manual_seed(0)
    return Viewer.fit(Judge().eval(), images(400, 0))


def images(count: int, seed: int, noise: int = 0) -> LabelledImages:
    """Smooth random images, with white noise if asked for."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 7, 7)).repeat(4, 1).repeat(4, 2)
    speckle = rng.integers(0, noise + 1, coarse.shape)
    return LabelledImages((coarse + speckle).astype(np.uint8), rng.integers(0, 10, count))


def test_a_set_is_at_no_distance_from_itself_and_noise_is_seen(viewer: Viewer) -> None:
    real, noisy = images(400, 1), images(400, 1, noise=50)
    views = viewer(real.images)
    same = measure(views, views.classes, views, views)
    for name in ("frechet", "frechet_pixels", "frechet_untrained", "frechet_teacher"):
        assert same[name].value == pytest.approx(0, abs=1e-4 * (1 + float(views.judge.max()) ** 2))
    assert (same["accuracy"].value, same["precision"].value, same["recall"].value) == (1, 1, 1)
    assert same["diversity"].value == pytest.approx(1)
    other = measure(viewer(noisy.images), noisy.labels, views, None)
    assert other["energy"].value > same["energy"].value
    assert other["frechet_untrained"].value > 0.01
    assert "frechet_teacher" not in other


def test_energy_is_that_of_what_a_mean_of_nine_removes(viewer: Viewer) -> None:
    flat = np.full((3, 28, 28), 77, np.uint8)
    assert viewer(flat).energy == pytest.approx(0, abs=1e-10)
    one = flat.copy()
    one[:, 10, 10] += 90
    height = 90 / 127.5
    # The mean spreads the dot over nine pixels: one loses 8/9 of it, eight gain 1/9.
    expected = height**2 * ((8 / 9) ** 2 + 8 / 81) / 784
    assert viewer(one).energy == pytest.approx(expected, rel=1e-4)


def test_the_error_of_the_distance_shrinks_with_the_images(viewer: Viewer) -> None:
    real = viewer(images(2000, 3).images)
    few, many = (
        measure(viewer(images(count, 4).images), np.zeros(count), real, None)["frechet"].error or 0
        for count in (200, 1600)
    )
    assert 0 < many < few
