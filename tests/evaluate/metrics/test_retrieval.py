"""Retrieval: copies are found, unrelated pictures are found by chance, ties are fair."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate.metrics.retrieval import topk_accuracy


def test_exact_copies_are_always_found() -> None:
    gallery = np.random.default_rng(0).standard_normal((60, 32))
    labels = [f"concept {i % 20}" for i in range(60)]
    assert topk_accuracy(7 * gallery, labels, gallery, labels, 1).tolist() == [1.0] * 60


def test_unrelated_pictures_are_found_by_chance() -> None:
    rng = np.random.default_rng(1)
    gallery, pictures = rng.standard_normal((60, 32)), rng.standard_normal((3000, 32))
    labels = [i % 20 for i in range(60)]
    wanted = rng.integers(0, 20, 3000).tolist()
    for k in (1, 5):
        error = np.sqrt(k / 20 * (1 - k / 20) / 3000)
        assert topk_accuracy(pictures, wanted, gallery, labels, k).mean() == pytest.approx(
            k / 20, abs=4 * error
        )


def test_a_collapsed_extractor_scores_as_chance() -> None:
    labels = list(range(10))
    same = np.ones((10, 4))
    assert topk_accuracy(same, labels, same, labels, 1) == pytest.approx(np.full(10, 0.1))
    assert topk_accuracy(np.zeros((10, 4)), labels, same, labels, 5) == pytest.approx(np.full(10, 0.5))


def test_labels_are_ranked_not_renderings() -> None:
    """Five renderings of one wrong concept take one place, not five."""
    gallery = np.array([[1.0, 0.01 * i] for i in range(5)] + [[1.0, 0.5], [0.0, 1.0]])
    labels = ["wrong"] * 5 + ["right", "other"]
    query = np.array([[1.0, 0.0]])
    assert topk_accuracy(query, ["right"], gallery, labels, 1).tolist() == [0.0]
    assert topk_accuracy(query, ["right"], gallery, labels, 2).tolist() == [1.0]
    assert topk_accuracy(query, ["other"], gallery, labels, 2).tolist() == [0.0]


def test_a_label_without_rendering_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference image of 'owl'"):
        topk_accuracy(np.ones((1, 2)), ["owl"], np.ones((1, 2)), ["cat"], 1)
