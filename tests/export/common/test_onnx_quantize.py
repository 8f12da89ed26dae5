"""Fewer bits a weight: what is stored, how far it is off, and that the arithmetic stays float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fewstep.export.common.gptq import CLIP_RATIOS, GROUP, to_groups
from fewstep.export.common.onnx_quantize import QuantSpec, quantize_dequantize, quantize_weights, to_int8
from fewstep.runtime.ort import ort

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((96, 64)).astype(np.float32)
KERNEL = RNG.standard_normal((16, 64, 3, 3)).astype(np.float32)
BIAS = RNG.standard_normal(16).astype(np.float32)


def graph(matrix: np.ndarray = MATRIX) -> Any:
    """``y = conv(x @ matrix)``: one matrix, one kernel, one bias."""
    nodes = [
        helper.make_node("MatMul", ["x", "matrix"], ["m"]),
        helper.make_node("Transpose", ["m"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "kernel", "bias"], ["y"]),
    ]
    weights = {"matrix": matrix, "kernel": KERNEL, "bias": BIAS}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 5, 5, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 16, 3, 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model


def run(model: Any, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_codes_are_symmetric_and_half_a_step_off_at_most() -> None:
    codes, scale = to_int8(MATRIX)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max() == 127
    assert (np.abs(codes * scale - MATRIX) <= 0.501 * scale).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_the_scale_runs_along_the_axis_that_loses_less(axis: int) -> None:
    spread = np.geomspace(1e-3, 1e3, MATRIX.shape[axis], dtype=np.float32)
    matrix = MATRIX * (spread[:, None] if axis == 0 else spread)
    codes, scale = to_int8(matrix)
    assert scale.shape[axis] == matrix.shape[axis]
    assert np.abs(codes * scale / matrix - 1)[np.abs(MATRIX) > 1].max() < 0.02


def test_an_empty_row_and_column_stay_empty() -> None:
    matrix = MATRIX.copy()
    matrix[3], matrix[:, 5] = 0, 0
    codes, scale = to_int8(matrix)
    assert np.isfinite(scale).all()
    assert not (codes * scale)[3].any()
    assert not (codes * scale)[:, 5].any()


@pytest.mark.parametrize(
    ("bits", "share", "error"),
    [(32, 1, 0), (16, 0.5, 2e-3), (8, 0.27, 3e-2), (6, 0.21, 0.1), (4, 0.14, 0.3), (2, 0.08, 1)],
)
def test_fewer_bits_are_fewer_bytes_and_nearly_the_same(bits: int, share: float, error: float) -> None:
    x = RNG.standard_normal((2, 5, 5, 96)).astype(np.float32)
    model = graph()
    small, full = quantize_weights(model, bits), run(model, x)
    weights = sum(array.nbytes for array in (MATRIX, KERNEL, BIAS))
    assert small.ByteSize() <= share * weights + 2000
    assert np.abs(run(small, x) - full).max() <= error * np.abs(full).max()
    types = {weight.name: weight.data_type for weight in small.graph.initializer}
    assert types["bias"] == TensorProto.FLOAT
    assert graph().SerializeToString() == model.SerializeToString()  # the original is left as it was


@pytest.mark.parametrize(("bits", "stored"), [(8, "kernel.int8"), (4, "kernel.plane4"), (3, "kernel.plane1")])
def test_a_kernel_has_as_few_bits_as_a_matrix(bits: int, stored: str) -> None:
    names = {weight.name for weight in quantize_weights(graph(), bits).graph.initializer}
    assert {stored, stored.replace("kernel", "matrix")} <= names


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(96, 64), (72, 64), (64, 72), (128, 128)])
def test_what_a_graph_unpacks_is_what_was_packed(bits: int, shape: tuple[int, int]) -> None:
    matrix = RNG.standard_normal(shape).astype(np.float32)
    matrix[:, 3], matrix[5] = 0, 0
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", s])
        for n, s in zip("xy", shape, strict=True)
    ]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(matrix, "matrix")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    unpacked = run(quantize_weights(model, bits), np.eye(shape[0], dtype=np.float32))
    found: list[np.ndarray] = []
    for axis in (0, 1):
        if shape[axis] % GROUP == 0:
            turned = matrix.T if axis == 0 else matrix
            codes, scale, error = to_groups(turned, bits)
            back = ((codes.reshape(-1, GROUP).astype(np.float32) - 2 ** (bits - 1)) * scale).reshape(
                turned.shape
            )
            assert np.square(back - turned).sum() == pytest.approx(error, rel=1e-3)
            found.append(back.T if axis == 0 else back)
    nearest = min(found, key=lambda back: float(np.square(back - matrix).sum()))
    np.testing.assert_allclose(unpacked, nearest, atol=1e-6)
    peak, half = np.abs(matrix).max(), 2 ** (bits - 1) - 1
    assert (
        np.abs(unpacked - matrix).max() <= max(0.5 / half, 1 - CLIP_RATIOS[0]) * peak * 1.01
    )  # or is cut off


def test_weights_that_are_spared_keep_their_bits() -> None:
    made = quantize_weights(graph(), 4, lambda array: QuantSpec(8 if array.ndim == 2 else 32))
    assert {"matrix.int8", "kernel"} <= {weight.name for weight in made.graph.initializer}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16, 32])
def test_what_is_said_to_be_left_of_a_weight_is_what_its_graph_unpacks(bits: int) -> None:
    small = quantize_weights(graph(), bits)
    known = {
        "matrix": quantize_dequantize(MATRIX, QuantSpec(bits))[0],
        "kernel": quantize_dequantize(KERNEL, QuantSpec(bits))[0],
    }
    model = graph()
    for weight in model.graph.initializer:
        if weight.name in known:
            weight.CopyFrom(numpy_helper.from_array(known[weight.name], weight.name))
    x = RNG.standard_normal((1, 5, 5, 96)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), run(small, x), atol=1e-4)


def test_what_float16_cannot_hold_stays_float32() -> None:
    matrix = MATRIX.copy()
    matrix[0, 0] = 1e6
    weights = {weight.name: weight for weight in quantize_weights(graph(matrix), 16).graph.initializer}
    assert weights["matrix"].data_type == TensorProto.FLOAT
    assert weights["kernel.half"].data_type == TensorProto.FLOAT16


def test_what_a_scale_cannot_say_keeps_more_bits() -> None:
    back, _ = quantize_dequantize(1e6 * MATRIX, QuantSpec(4))
    np.testing.assert_allclose(back, 1e6 * MATRIX, atol=1e6 * np.abs(MATRIX).max() / 127)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    x = RNG.standard_normal((4, 5, 5, 96)).astype(np.float32)
    x[1:] *= 100  # neighbours that would stretch a shared scale of activations
    small = quantize_weights(graph(), 8)
    alone, together = run(small, x[:1]), run(small, x)[:1]
    assert np.abs(alone - together).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("shape", [(1, 24, 24), (24, 24, 1, 1), (1, 64, 128), (32, 48, 1, 1)])
def test_axes_of_length_one_change_nothing(bits: int, shape: tuple[int, ...]) -> None:
    array = RNG.standard_normal(shape).astype(np.float32)
    flat, _ = quantize_dequantize(array.squeeze(), QuantSpec(bits))
    back, _ = quantize_dequantize(array, QuantSpec(bits))
    assert back.shape == shape
    assert np.array_equal(back.squeeze(), flat)
