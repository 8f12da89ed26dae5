"""Smaller weights in an ONNX graph, the arithmetic left in float32.

8 bits: matrices (linear layers, embeddings) become int8 with one scale a row or a column, whichever loses
less, convolution kernels with one for each of their outputs. Below: codes with a float16 scale for every
:data:`GROUP` of a row or a column, packed without a gap. 16 bits: all of them float16. The operators that
unpack (``Cast``, shifts, ``Mul`` by the scale) stand before the layer, and onnxruntime folds them away when
it makes the session: a file a quarter as large runs as fast as float32, and a picture depends neither on its
batch nor on the processor's integer instructions. ``docs/deploy.md`` has what else was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.export.common.calibration import CalibrationStats

SMALLEST = 4096
"""Tensors of fewer elements (biases, scales of norms) stay as they are."""

GROUP = 64
"""Codes that share a scale, where they have less than 8 bits."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""How codes are laid down: their low bits, as many codes a byte as there is room for, then the high ones.

A byte holds codes that lie far apart, so that one shift moves a long row of bytes: of neighbours in a byte,
onnxruntime unpacks half as many a second.
"""

TRIED = np.linspace(0.7, 1.0, 7, dtype=np.float32)
"""Shares of a group's peak that its last code may stand for: cutting off can cost less than coarseness."""

LARGEST = float(np.finfo(np.float16).max)
"""Scale of a group. With what the columns before it leave it to make up for, its peak can be larger."""


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is stored.

    Attributes:
        bits: an element.
        inputs: that met it, where they are known: codes with a scale a group then make up for one another.
    """

    bits: int
    inputs: CalibrationStats | None = None


Choose = Callable[[np.ndarray], QuantSpec | None]
"""How a weight is stored if not as the others; ``None`` for no word of its own."""


def quantize_weights(model: Any, bits: int, choose: Choose | None = None) -> Any:
    """A copy of an ``onnx.ModelProto`` with its weights stored in fewer bits each.

    Args:
        model: what :func:`fewstep.export.common.graphs.trace` gives.
        bits: 2, 3, 4, 5, 6, 8, 16 or 32 a weight.
        choose: weights that are stored in another way.
    """
    import onnx
    from onnx import numpy_helper

    small = onnx.ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    stored: list[Any] = []
    unpack: list[Any] = []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < SMALLEST:
            stored.append(weight)
            continue
        made, array = _Stored(weight.name), numpy_helper.to_array(weight)
        made.put(array, (choose(array) if choose else None) or QuantSpec(bits))
        stored += made.tensors
        unpack += made.nodes
    nodes = [*unpack, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)
    return small


@dataclass
class _Stored:
    """One weight in its small form: the tensors that are stored, and the nodes that make ``name`` of them."""

    name: str
    tensors: list[Any] = field(default_factory=list[Any])
    nodes: list[Any] = field(default_factory=list[Any])

    def put(self, array: np.ndarray, how: QuantSpec) -> None:
        """Store ``array`` as chosen, or in the fewest bits above that its shape and range allow.

        Axes of length 1 do not count: an exporter adds some, and what is stored must be what was measured.
        """
        bits, matrix = how.bits, array.squeeze()
        if bits <= 8 and matrix.ndim == 2 and matrix.shape != array.shape:
            inner = _Stored(f"{self.name}.matrix", self.tensors, self.nodes)
            inner.put(matrix, how)
            self._node("Reshape", inner.name, self._tensor("whole", np.array(array.shape)), out=self.name)
            return
        rows = array.reshape(len(array), -1)
        axes = [axis for axis in ((1, 0) if array.ndim == 2 else (1,)) if rows.shape[axis] % GROUP == 0]
        halves = np.abs(array).max() <= LARGEST
        if bits in PLANES and axes and halves:
            self._grouped(array, how, axes)
        elif bits <= 8:
            self._scaled(array, (0, 1) if array.ndim == 2 else (1,))
        elif bits < 32 and halves:
            self._node("Cast", self._tensor("half", array.astype(np.float16)), to=FLOAT, out=self.name)
        else:
            self._tensor("", array)

    def _scaled(self, array: np.ndarray, axes: Sequence[int]) -> None:
        """8 bits, a scale a row or a column; a kernel has a scale for each of its outputs."""
        codes, scale = to_int8(array.reshape(len(array), -1), axes)
        if array.ndim > 2:
            codes, scale = codes.reshape(array.shape), scale.reshape(-1, *[1] * (array.ndim - 1))
        real = self._node("Cast", self._tensor("int8", codes), to=FLOAT)
        self._node("Mul", real, self._tensor("scale", scale), out=self.name)

    def _grouped(self, array: np.ndarray, how: QuantSpec, axes: Sequence[int]) -> None:
        """Fewer bits, a scale a :data:`GROUP`: along the inputs if they are known, or the axis that loses
        less."""
        rows, bits, factor = array.reshape(len(array), -1), how.bits, None
        if how.inputs and (along := 0 if how.inputs.transposed(array) else 1) in axes:
            axes, factor = [along], how.inputs.factor()
        tried = {axis: to_groups(rows.T if axis == 0 else rows, bits, factor) for axis in axes}
        axis = min(tried, key=lambda each: tried[each][2])
        codes, scale, _ = tried[axis]
        groups = (-1, GROUP)
        if axis == 0:  # laid down as they are used: a column of the array has its scales below one another
            groups = (-1, GROUP, rows.shape[1])
            codes, scale = codes.reshape(groups[2], -1).T, scale.reshape(groups[2], -1).T[:, None]
        real = self._node("Cast", self._signed(codes.reshape(-1), bits, groups), to=FLOAT)
        unit = self._tensor("unit", np.float32(2.0 ** (bits - 8)))
        unit = self._node("Mul", self._node("Cast", self._tensor("scale", scale), to=FLOAT), unit)
        shape = self._tensor("shape", np.array(array.shape))
        self._node("Reshape", self._node("Mul", real, unit), shape, out=self.name)

    def _signed(self, codes: np.ndarray, bits: int, shape: Sequence[int]) -> str:
        """Codes ``[N]`` of their packed planes, as the upper bits of int8.

        What onnxruntime folds away it holds until a whole graph is folded: bytes, as long as they can be.
        """
        signed = (codes ^ 2 ** (bits - 1)).astype(np.uint8)
        below, made, laid = 0, "", self._tensor("groups", np.array(shape))
        for width in PLANES[bits]:
            part = (signed >> below) & (2**width - 1)
            shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
            packed = np.bitwise_or.reduce(part.reshape(len(shifts), -1) << shifts, axis=0, keepdims=True)
            bytes_, by = self._tensor(f"plane{width}", packed), self._tensor(f"shifts{width}", shifts[::-1])
            moved, upper = self._node("BitShift", bytes_, by, direction="LEFT"), 256 - 2 ** (8 - width)
            plane = self._node("BitwiseAnd", moved, self._tensor(f"mask{width}", np.uint8(upper)))
            plane = self._node("Reshape", plane, laid)
            below += width
            if below < bits:
                down = self._tensor(f"down{width}", np.uint8(bits - below))
                plane = self._node("BitShift", plane, down, direction="RIGHT")
            made = self._node("BitwiseOr", made, plane) if made else plane
        return self._node("Cast", made, to=INT8)

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


def quantize_dequantize(array: np.ndarray, how: QuantSpec) -> tuple[np.ndarray, int]:
    """What is left of a weight that was stored so, float32, as its graph will unpack it; and the bytes that
    it takes."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    made = _Stored("weight")
    made.put(array, how)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.tensors}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not made.nodes:
        return tensors["weight"], size
    graph = onnx.helper.make_graph(
        made.nodes, "one", [], [onnx.helper.make_tensor_value_info("weight", FLOAT, None)], made.tensors
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    (back,) = ReferenceEvaluator(model).run(None, {})
    return np.asarray(back, np.float32), size


FLOAT, INT8 = 1, 3
"""``onnx.TensorProto.FLOAT`` and ``INT8``, which need not be imported to say so."""


def to_int8(matrix: np.ndarray, axes: Sequence[int] = (0, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit codes and their scale, so that ``codes * scale`` is near ``matrix``.

    Args:
        matrix: float32 ``[K, N]``.
        axes: along which a scale may hold.

    Returns:
        int8 ``[K, N]`` in -127..127, and a float32 scale ``[1, N]`` (along 0) or ``[K, 1]`` (along 1): the
        one of the smaller squared error.
    """
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    for axis in axes:
        peak = np.abs(matrix).max(axis, keepdims=True)
        scale = (np.where(peak > 0, peak, 127) / 127).astype(np.float32)
        codes = np.rint(matrix / scale).clip(-127, 127).astype(np.int8)
        found.append((float(np.square(codes * scale - matrix).sum()), codes, scale))
    _, codes, scale = min(found, key=lambda item: item[0])
    return codes, scale


def to_groups(
    matrix: np.ndarray, bits: int, factor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Codes with a scale a group, so that ``(codes - 2^(bits - 1)) * scale`` is near ``matrix``.

    The scale of a group is the one of :data:`TRIED` that loses least. With ``factor`` what is near are the
    products with the inputs of calibration: the columns behind one make up for its error before they are
    rounded themselves (GPTQ; Frantar et al., arXiv 2210.17323, section 3).

    Args:
        matrix: float32 ``[R, C]``; :data:`GROUP` divides ``C``.
        bits: of a code.
        factor: of the ``C`` inputs (:meth:`fewstep.export.common.calibration.CalibrationStats.factor`).

    Returns:
        uint8 codes ``[R C]``, rows one after the other; float16 scales ``[R C / GROUP, 1]``; the sum of
        squared errors of the elements, whatever ``factor`` is.
    """
    half, count = 2 ** (bits - 1), matrix.shape[1]
    left = matrix.copy()
    codes, scales = np.empty_like(left), np.empty((len(left), count // GROUP), np.float32)
    for begin in range(0, count, GROUP):
        group = left[:, begin : begin + GROUP]  # a view
        scale = _scale(group, half)
        scales[:, begin // GROUP] = scale[:, 0]
        if factor is None:
            codes[:, begin : begin + GROUP] = _codes(group, scale, half)
            continue
        errors = np.empty_like(group)
        for at in range(GROUP):
            row, column = factor[begin + at], group[:, at : at + 1]
            code = _codes(column, scale, half)
            codes[:, begin + at] = code[:, 0]
            errors[:, at] = ((column - code * scale) / row[begin + at])[:, 0]
            group[:, at + 1 :] -= np.outer(errors[:, at], row[begin + at + 1 : begin + GROUP])
        left[:, begin + GROUP :] -= errors @ factor[begin : begin + GROUP, begin + GROUP :]
    whole = (codes.reshape(-1, GROUP) * scales.reshape(-1, 1)).reshape(matrix.shape)
    packed = (codes + half).astype(np.uint8).reshape(-1)
    return packed, scales.reshape(-1, 1).astype(np.float16), float(np.square(whole - matrix).sum())


def _scale(groups: np.ndarray, half: int) -> np.ndarray:
    """Of each group (a row) the scale that loses least, as float16 can say it, ``[N, 1]``."""
    peak = np.abs(groups).max(1, keepdims=True)
    best, least = np.ones_like(peak), np.full_like(peak, np.inf)
    for share in TRIED:
        scale = np.minimum(peak * share / (half - 1), LARGEST).astype(np.float16).astype(np.float32)
        scale[scale == 0] = 1  # a group of zeros, or of less than float16 can say
        error = np.square(_codes(groups, scale, half) * scale - groups).sum(1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _codes(groups: np.ndarray, scale: np.ndarray, half: int) -> np.ndarray:
    return np.rint(groups / scale).clip(-half, half - 1)
