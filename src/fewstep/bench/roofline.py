"""How fast a graph could be at best: its operations and bytes over what the device does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fewstep.bench.hardware import DevicePeak
from fewstep.runtime.bundle import read

FLOAT = 4
"""Bytes of an ONNX weight while it is multiplied: all are unpacked when the session is made."""


@dataclass(frozen=True)
class GraphCost:
    """What one call of a graph must do.

    Attributes:
        operations: multiplications and additions of matrix products and convolutions, each counted.
        bytes: of the weights that they read.
    """

    operations: float
    bytes: float

    def seconds(self, rates: DevicePeak) -> float:
        """The least time: that of whichever takes longer."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


def bundle_cost(folder: Path, batch: int, steps: int) -> dict[str, GraphCost]:
    """The work of a batch of pictures, by stage as :mod:`fewstep.bench.worker` names them; nothing for an
    engine whose graphs cannot be counted."""
    bundle = read(folder)
    counted = {"onnx": count, "openvino": count_openvino}.get(bundle.engine)
    if counted is None:
        return {}
    of = {"text": ("text", batch, 1), "modulation": ("modulation", batch * steps, 1)}
    of |= {"steps": ("transformer", batch, steps), "decode": ("decoder", batch, 1)}
    works = {stage: (counted(bundle.graph(stem), rows), times) for stage, (stem, rows, times) in of.items()}
    return {stage: GraphCost(work.operations * n, work.bytes * n) for stage, (work, n) in works.items()}


def count(path: Path, batch: int) -> GraphCost:
    """The work of one call of an ONNX graph, its free batch size being ``batch``."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]  # as traced, with a batch of no size
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
    """The work of one call of an OpenVINO graph, its free batch size being ``batch``.

    OpenVINO can multiply by weights as they are stored: their bytes count so.
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
    """Bytes of the constants that ``node`` is made of, by those of its inputs; ``None`` where it is made of
    other things too."""
    if node.get_type_name() == "Constant":
        return node.get_byte_size()
    return None if not made_of or None in made_of else sum(part or 0 for part in made_of)


def _inner(node: Any, shapes: dict[str, list[int]]) -> int:
    """How many products are summed for one number of the output."""
    weights = shapes[node.input[1]]
    if node.op_type == "Conv":
        return prod(weights[1:])
    turned = any(each.name == "transB" and each.i for each in node.attribute)
    return weights[-1] if turned else weights[-2]


def _shape(value: Any) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
