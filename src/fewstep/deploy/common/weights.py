"""Smaller weights in an ONNX graph, the arithmetic left in float32 (floor 3).

8 bits: matrices (linear layers, embeddings) become int8 with one scale a row or a column, whichever loses
less; convolution kernels, few but felt in every pixel, become float16. 16 bits: all of them float16. In
both, ``Cast`` (and ``Mul`` by the scale) stand before the layer, and onnxruntime folds them away when it
makes the session: a file a quarter as large runs as fast as float32, and a picture depends neither on its
batch nor on the processor's integer instructions. ``docs/deploy.md`` has what else was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SMALLEST = 4096
"""Tensors of fewer elements (biases, scales of norms) stay as they are."""


def shrink(model: Any, bits: int) -> Any:
    """A copy of an ``onnx.ModelProto`` with its weights stored in ``bits`` (8, 16 or 32) each."""
    import onnx
    from onnx import helper, numpy_helper

    small = onnx.ModelProto()
    small.CopyFrom(model)
    if bits == 32:
        return small
    graph = small.graph
    stored: list[Any] = []
    unpack: list[Any] = []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < SMALLEST:
            stored.append(weight)
            continue
        name, array = weight.name, numpy_helper.to_array(weight)
        if bits == 8 and array.ndim == 2:
            codes, scale = to_int8(array)
            stored.append(numpy_helper.from_array(codes, f"{name}.int8"))
            stored.append(numpy_helper.from_array(scale, f"{name}.scale"))
            unpack += [
                helper.make_node("Cast", [f"{name}.int8"], [f"{name}.codes"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Mul", [f"{name}.codes", f"{name}.scale"], [name]),
            ]
        elif np.abs(array).max() <= np.finfo(np.float16).max:
            stored.append(numpy_helper.from_array(array.astype(np.float16), f"{name}.half"))
            unpack.append(helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
        else:
            stored.append(weight)
    nodes = [*unpack, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)
    return small


def to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit codes and their scale, so that ``codes * scale`` is near ``matrix``.

    Args:
        matrix: float32 ``[K, N]``.

    Returns:
        int8 ``[K, N]`` in -127..127, and a float32 scale ``[1, N]`` or ``[K, 1]``: the one of the smaller
        squared error.
    """
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    for axis in (0, 1):
        peak = np.abs(matrix).max(axis, keepdims=True)
        scale = (np.where(peak > 0, peak, 127) / 127).astype(np.float32)
        codes = np.rint(matrix / scale).clip(-127, 127).astype(np.int8)
        found.append((float(np.square(codes * scale - matrix).sum()), codes, scale))
    _, codes, scale = min(found, key=lambda item: item[0])
    return codes, scale
