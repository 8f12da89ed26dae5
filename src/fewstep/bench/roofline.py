"""Roofline bounds: operations and bytes of a graph over the peak rates of the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.bench.hardware import DevicePeak
from fewstep.runtime.bundle import read

if TYPE_CHECKING:
    import onnx


FLOAT = 4
"""Bytes of an ONNX weight in a product: the session unpacks all weights."""


@dataclass(frozen=True)
class GraphCost:
    """Operations and bytes of one call of a graph.

    Attributes:
        operations: multiplications and additions of matrix products and convolutions, both counted.
        bytes: of the weights that these read.
    """

    operations: float
    bytes: float

    def seconds(self, rates: DevicePeak) -> float:
        """Return the roofline bound: the longer of the times of arithmetic and reading."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


def bundle_cost(folder: Path, batch: int, steps: int) -> dict[str, GraphCost]:
    """Return the cost of one batch of images by stage; empty for an engine whose graphs cannot be counted."""
    bundle = read(folder)
    counted = {"onnx": count, "openvino": count_openvino}.get(bundle.engine)
    if counted is None:
        return {}
    of = {"text": ("text", batch, 1), "modulation": ("modulation", batch * steps, 1)}
    of |= {"steps": ("transformer", batch, steps), "decode": ("decoder", batch, 1)}
    works = {stage: (counted(bundle.graph(stem), rows), times) for stage, (stem, rows, times) in of.items()}
    return {stage: GraphCost(work.operations * n, work.bytes * n) for stage, (work, n) in works.items()}


def count(path: Path, batch: int) -> GraphCost:
    """Return the cost of one call of an ONNX graph at this batch size."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]  # as traced, with an unknown batch size
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}
    shapes |= {weight.name: list(weight.dims) for weight in graph.initializer}
    fixed = {weight.name for weight in graph.initializer}
    operations, read_ = 0.0, 0.0
    for node in graph.node:
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)  # folded when the session is made
            continue
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            operations += 2 * prod(shapes[node.output[0]]) * _inner(node, shapes)
            read_ += sum(FLOAT * prod(shapes[name]) for name in node.input if name in fixed)
    return GraphCost(operations, read_)


def count_openvino(path: Path, batch: int) -> GraphCost:
    """Return the cost of one call of an OpenVINO graph at this batch size.

    OpenVINO multiplies by weights as stored, so their stored bytes are counted.
    """
    from fewstep.runtime import openvino

    model: Any = openvino.read(path)
    shapes = {port: port.get_partial_shape() for port in model.inputs}
    for shape in shapes.values():
        shape[0] = batch
    model.reshape(shapes)
    operations, read_ = 0.0, 0.0
    stored: dict[str, int | None] = {}
    for node in model.get_ordered_ops():
        made_of = [stored[value.get_node().get_name()] for value in node.input_values()]
        stored[node.get_name()] = _stored(node, made_of)
        if node.get_type_name() not in ("MatMul", "Convolution") or None not in made_of:
            continue
        weights: list[int] = list(node.get_input_shape(1))
        if node.get_type_name() == "Convolution":
            inner = prod(weights[1:])
        else:
            inner = weights[-1] if node.get_attributes()["transpose_b"] else weights[-2]
        operations += 2 * prod(node.get_output_shape(0)) * inner
        read_ += sum(part or 0 for part in made_of)
    return GraphCost(operations, read_)


def _stored(node: Any, made_of: Sequence[int | None]) -> int | None:
    """Return the bytes of the constants that ``node`` consists of; ``None`` if it depends on other values."""
    if node.get_type_name() == "Constant":
        return node.get_byte_size()
    return None if not made_of or None in made_of else sum(part or 0 for part in made_of)


def _inner(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Return how many products are summed for one number of the output."""
    weights = shapes[node.input[1]]
    if node.op_type == "Conv":
        return prod(weights[1:])
    turned = any(each.name == "transB" and each.i for each in node.attribute)
    return weights[-1] if turned else weights[-2]


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
