"""Weight-only quantization of ONNX graphs, with float32 arithmetic.

* 16 bits: float16.
* 8 bits: int8. A matrix (linear layer, embedding) has one scale per row or per column, whichever has the
  smaller error. A convolution kernel has one scale per output channel.
* Fewer bits: packed codes with a float16 scale per :data:`~fewstep.export.common.gptq.GROUP` elements of a
  row or column.

Operators that unpack the codes (``Cast``, shifts, ``Mul`` by the scale) precede the layer. onnxruntime folds
them when it creates the session. A file of a quarter of the size therefore runs as fast as float32. An image
depends neither on its batch nor on the processor's integer instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.export.common.calibration import CalibrationStats
from fewstep.export.common.gptq import GROUP, LARGEST, to_groups

if TYPE_CHECKING:
    import onnx

SMALLEST = 4096
"""Smallest number of elements of a quantized tensor. Biases and scales of norms have fewer."""


PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""Bit planes of packed codes: the low bits of all codes, then the high bits.

A byte of a plane holds codes that are far apart, so that one shift moves a long row of bytes. With adjacent
codes in a byte, onnxruntime unpacks at half the speed.
"""


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is stored.

    Attributes:
        bits: bits per element.
        inputs: calibration statistics of the layer's inputs. With them, grouped codes are rounded by GPTQ.
    """

    bits: int
    inputs: CalibrationStats | None = None


Choose = Callable[[np.ndarray], QuantSpec | None]
"""A function of a weight that returns how it is stored; ``None`` for the default."""


def quantize_weights(model: onnx.ModelProto, bits: int, choose: Choose | None = None) -> onnx.ModelProto:
    """Return a copy of an ``onnx.ModelProto`` with quantized weights.

    Args:
        model: the result of :func:`fewstep.export.common.graphs.trace`.
        bits: bits per weight: 2, 3, 4, 5, 6, 8, 16 or 32.
        choose: selects how single weights are stored instead.
    """
    import onnx
    from onnx import numpy_helper

    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    stored: list[onnx.TensorProto] = []
    unpack: list[onnx.NodeProto] = []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < SMALLEST:
            stored.append(weight)
            continue
        result, array = _StoredWeight(weight.name), numpy_helper.to_array(weight)
        result.store(array, (choose(array) if choose else None) or QuantSpec(bits))
        stored += result.tensors
        unpack += result.nodes
    nodes = [*unpack, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)
    return quantized


@dataclass
class _StoredWeight:
    """A quantized weight: the stored tensors, and the nodes that unpack them to ``name``."""

    name: str
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def store(self, array: np.ndarray, spec: QuantSpec) -> None:
        """Store ``array`` as ``spec`` says, or in the next larger bits that its shape and range allow.

        Axes of length 1 are ignored. Exporters add some, and the stored weight must be the measured one.
        """
        bits, matrix = spec.bits, array.squeeze()
        if bits <= 8 and matrix.ndim == 2 and matrix.shape != array.shape:
            inner = _StoredWeight(f"{self.name}.matrix", self.tensors, self.nodes)
            inner.store(matrix, spec)
            self._node("Reshape", inner.name, self._tensor("whole", np.array(array.shape)), out=self.name)
            return
        rows = array.reshape(len(array), -1)
        axes = [axis for axis in ((1, 0) if array.ndim == 2 else (1,)) if rows.shape[axis] % GROUP == 0]
        fits_float16 = np.abs(array).max() <= LARGEST
        if bits in PLANES and axes and fits_float16:
            self._grouped(array, spec, axes)
        elif bits <= 8:
            self._scaled(array, (0, 1) if array.ndim == 2 else (1,))
        elif bits < 32 and fits_float16:
            self._node("Cast", self._tensor("half", array.astype(np.float16)), to=FLOAT, out=self.name)
        else:
            self._tensor("", array)

    def _scaled(self, array: np.ndarray, axes: Sequence[int]) -> None:
        """Store in 8 bits with a scale per row or column; a kernel has one per output channel."""
        codes, scale = to_int8(array.reshape(len(array), -1), axes)
        if array.ndim > 2:
            codes, scale = codes.reshape(array.shape), scale.reshape(-1, *[1] * (array.ndim - 1))
        real = self._node("Cast", self._tensor("int8", codes), to=FLOAT)
        self._node("Mul", real, self._tensor("scale", scale), out=self.name)

    def _grouped(self, array: np.ndarray, spec: QuantSpec, axes: Sequence[int]) -> None:
        """Store in fewer bits with a scale per :data:`fewstep.export.common.gptq.GROUP`.

        Groups are along the inputs if their statistics are known, else along the axis of the smaller error.
        """
        rows, bits, factor = array.reshape(len(array), -1), spec.bits, None
        if spec.inputs and (along := 0 if spec.inputs.transposed(array) else 1) in axes:
            axes, factor = [along], spec.inputs.factor()
        candidates = {axis: to_groups(rows.T if axis == 0 else rows, bits, factor) for axis in axes}
        axis = min(candidates, key=lambda each: candidates[each][2])
        codes, scale, _ = candidates[axis]
        groups = (-1, GROUP)
        if axis == 0:  # in the order of use: the scales of a column of the array are in one column
            groups = (-1, GROUP, rows.shape[1])
            codes, scale = codes.reshape(groups[2], -1).T, scale.reshape(groups[2], -1).T[:, None]
        real = self._node("Cast", self._signed(codes.reshape(-1), bits, groups), to=FLOAT)
        unit = self._tensor("unit", np.float32(2.0 ** (bits - 8)))
        unit = self._node("Mul", self._node("Cast", self._tensor("scale", scale), to=FLOAT), unit)
        shape = self._tensor("shape", np.array(array.shape))
        self._node("Reshape", self._node("Mul", real, unit), shape, out=self.name)

    def _signed(self, codes: np.ndarray, bits: int, shape: Sequence[int]) -> str:
        """Pack codes ``[N]`` in planes; return the name of the unpacked int8 tensor, codes in its upper bits.

        onnxruntime keeps folded constants until the whole graph is folded. So they stay bytes as long as
        possible.
        """
        signed = (codes ^ 2 ** (bits - 1)).astype(np.uint8)
        below, joined, groups = 0, "", self._tensor("groups", np.array(shape))
        for width in PLANES[bits]:
            part = (signed >> below) & (2**width - 1)
            shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
            packed = np.bitwise_or.reduce(part.reshape(len(shifts), -1) << shifts, axis=0, keepdims=True)
            bytes_, by = self._tensor(f"plane{width}", packed), self._tensor(f"shifts{width}", shifts[::-1])
            moved, upper = self._node("BitShift", bytes_, by, direction="LEFT"), 256 - 2 ** (8 - width)
            plane = self._node("BitwiseAnd", moved, self._tensor(f"mask{width}", np.uint8(upper)))
            plane = self._node("Reshape", plane, groups)
            below += width
            if below < bits:
                down = self._tensor(f"down{width}", np.uint8(bits - below))
                plane = self._node("BitShift", plane, down, direction="RIGHT")
            joined = self._node("BitwiseOr", joined, plane) if joined else plane
        return self._node("Cast", joined, to=INT8)

    def _tensor(self, kind: str, array: ArrayLike) -> str:
        from onnx import numpy_helper

        name = f"{self.name}.{kind}" if kind else self.name
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _node(self, kind: str, *inputs: str, out: str | None = None, **options: Any) -> str:
        from onnx import helper

        name = out or f"{self.name}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **options))
        return name


def quantize_dequantize(array: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, int]:
    """Quantize a weight; return it as its graph unpacks it, in float32, and its stored size in bytes."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    stored = _StoredWeight("weight")
    stored.store(array, spec)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored.tensors}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not stored.nodes:
        return tensors["weight"], size
    graph = onnx.helper.make_graph(
        stored.nodes, "one", [], [onnx.helper.make_tensor_value_info("weight", FLOAT, None)], stored.tensors
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    (back,) = ReferenceEvaluator(model).run(None, {})
    return np.asarray(back, np.float32), size


FLOAT, INT8 = 1, 3
"""``onnx.TensorProto.FLOAT`` and ``INT8``, without an import of onnx."""


def to_int8(matrix: np.ndarray, axes: Sequence[int] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Return symmetric 8-bit codes and their scales, so that ``codes * scale`` approximates ``matrix``.

    Args:
        matrix: float32 ``[K, N]``.
        axes: axes along which a scale may be shared. That of the smaller squared error is taken.

    Returns:
        int8 codes ``[K, N]`` in -127..127, and float32 scales ``[1, N]`` (axis 0) or ``[K, 1]`` (axis 1).
    """
    candidates: list[tuple[float, np.ndarray, np.ndarray]] = []
    for axis in axes:
        peak = np.abs(matrix).max(axis, keepdims=True)
        scale = (np.where(peak > 0, peak, 127) / 127).astype(np.float32)
        codes = np.rint(matrix / scale).clip(-127, 127).astype(np.int8)
        candidates.append((float(np.square(codes * scale - matrix).sum()), codes, scale))
    _, codes, scale = min(candidates, key=lambda item: item[0])
    return codes, scale
