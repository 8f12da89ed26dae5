"""Core ML packages read back and run in torch, operator by operator, where Core ML itself cannot run.

What it computes is what the file says, in the types that it says (or all in float32); that Apple's engines
round in the same places is not claimed. An operator that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.models import MLModel
from torch import Tensor

KINDS = {"fp16": torch.float16, "fp32": torch.float32, "bool": torch.bool}
WHOLE = {"int16": np.int16, "uint16": np.uint16, "int32": np.int32}
INTERPRETED: dict[str, Callable[..., Any]] = {}


class Package:
    """A ``.mlpackage``.

    Args:
        path: the package.
        exact: compute what it says is float16 in float32.
    """

    def __init__(self, path: Path, exact: bool = True) -> None:
        model = MLModel(str(path), skip_model_load=True)
        self.spec = model.get_spec()
        self.exact = exact
        program = load(self.spec, self.spec.specificationVersion, model.weights_dir)
        self.main = program.functions["main"]
        self.ops = list(self.main.operations)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {each.name: tuple(each.type.multiArrayType.shape) for each in self.spec.description.input}

    @property
    def outputs(self) -> list[str]:
        return [each.name for each in self.spec.description.output]

    def weights(self) -> dict[str, tuple[Any, str]]:
        """Every float tensor of two axes or more, as float32 under its name in the file, and how it lies
        there: the type of its operator."""
        found: dict[str, tuple[Any, str]] = {}
        for op in self.ops:
            if op.op_type.startswith("constexpr"):
                found[op.outputs[0].name] = (dense(op), op.op_type)
            elif op.op_type == "const" and getattr(op.outputs[0].val, "ndim", 0) > 1:
                if op.outputs[0].val.dtype.kind == "f" and not _is_part(op):
                    found[op.outputs[0].name] = (op.outputs[0].val.astype(np.float32), "const")
        return found

    def predict(self, given: dict[str, Any]) -> dict[str, np.ndarray]:
        """As ``coremltools.models.MLModel.predict``: the outputs by their names."""
        assert given.keys() == self.inputs.keys(), given.keys()
        for name, shape in self.inputs.items():
            assert np.shape(given[name]) == shape, (name, np.shape(given[name]), shape)
        self.values: dict[str, Any] = {name: torch.from_numpy(np.asarray(x)) for name, x in given.items()}
        with torch.no_grad():
            for op in self.ops:
                if op.op_type == "const" or all(self._unused(out) for out in op.outputs):
                    continue
                if op.op_type.startswith("constexpr"):
                    made = self._typed(torch.from_numpy(dense(op)), torch.float16)
                else:
                    said = {name: self._value(name, var) for name, var in op.inputs.items()}
                    made = INTERPRETED[op.op_type](**said)
                    if op.op_type == "cast" and self.exact and made.dtype == torch.float16:
                        made = made.float()
                outs = made if isinstance(made, tuple | list) else (made,)
                for var, value in zip(op.outputs, outs, strict=True):
                    assert tuple(value.shape) == tuple(var.shape), (op.op_type, value.shape, var.shape)
                    self.values[var.name] = value
        return {name: self.values[name].numpy() for name in self.outputs}

    def _unused(self, var: Any) -> bool:
        return not var.child_ops and var not in self.main.outputs

    def _typed(self, tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.to(torch.float32 if self.exact else kind)

    def _value(self, name: str, var: Any) -> Any:
        if isinstance(var, tuple | list):
            return [self._value(name, each) for each in var]
        if var.name in self.values:
            return self.values[var.name]
        value = var.val
        if isinstance(value, np.ndarray) and name not in NUMBERS:
            tensor = torch.from_numpy(value.astype(np.int32) if value.dtype == np.uint16 else value)
            return self._typed(tensor, tensor.dtype) if tensor.dtype == torch.float16 else tensor
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, np.floating):
            return float(value) if self.exact else torch.tensor(value)
        return value.item() if isinstance(value, np.generic) else value


def _plain(x: Tensor, *switches: bool) -> Tensor:
    assert not any(switches)
    return x


NUMBERS = {
    *("shape", "perm", "axes", "begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask"),
    *("split_sizes", "strides", "pad", "dilations"),
}
"""Inputs that are lists of numbers and no tensors."""


def dense(op: Any) -> np.ndarray:
    """The weight behind a palette or behind integers with scales, float32; by the format's definition."""
    if op.op_type == "constexpr_blockwise_shift_scale":
        assert op.inputs.get("offset") is None
        data, scale = op.data.val.astype(np.float32), op.scale.val.astype(np.float32)
        for axis, size in enumerate(data.shape):
            scale = scale.repeat(size // scale.shape[axis], axis)
        return data * scale
    assert op.op_type == "constexpr_lut_to_dense", op.op_type
    palettes, indices = op.lut.val.astype(np.float32), op.indices.val.astype(np.int64)
    assert palettes.shape[-1] == 1
    assert palettes.shape[1:-2] == (1,) * (indices.ndim - 1)
    palettes = palettes.reshape(len(palettes), -1)
    groups = np.arange(len(indices)) // (len(indices) // len(palettes))
    return palettes[groups.reshape(-1, *[1] * (indices.ndim - 1)), indices]


def _is_part(op: Any) -> bool:
    return any(child.op_type.startswith("constexpr") for child in op.outputs[0].child_ops)


def interprets(function: Callable[..., Any]) -> Callable[..., Any]:
    INTERPRETED[function.__name__.strip("_")] = function
    return function


def _of(*names: str, by: Callable[..., Any]) -> None:
    INTERPRETED.update(dict.fromkeys(names, by))


_of("add", by=lambda x, y: x + y)
_of("sub", by=lambda x, y: x - y)
_of("mul", by=lambda x, y: x * y)
_of("real_div", by=lambda x, y: x / y)
_of("equal", by=lambda x, y: x == y)
_of("greater", by=lambda x, y: x > y)
_of("greater_equal", by=lambda x, y: x >= y)
_of("maximum", by=lambda x, y: torch.maximum(x, torch.as_tensor(y, dtype=x.dtype)))
_of("clip", by=lambda x, alpha, beta: x.clamp(alpha, beta))
_of("abs", by=lambda x: torch.abs(x))
_of("square", by=lambda x: torch.square(x))
_of("sin", by=lambda x: torch.sin(x))
_of("cos", by=lambda x: torch.cos(x))
_of("identity", by=lambda x: x)
_of("sigmoid", by=lambda x: torch.sigmoid(x))
_of("relu", by=lambda x: torch.relu(x))
_of("silu", by=lambda x: F.silu(x))
_of("tanh", by=lambda x: torch.tanh(x))
_of("rsqrt", by=lambda x, epsilon: torch.rsqrt(x + epsilon))
_of("softmax", by=lambda x, axis: x.softmax(axis))
_of("expand_dims", by=lambda x, axes: x[(..., *[None] * len(axes))].movedim(-1, axes[0]))
_of("squeeze", by=lambda x, axes: x.squeeze(tuple(axes)))
_of("reshape", by=lambda x, shape: x.reshape(shape))
_of("transpose", by=lambda x, perm: x.permute(perm))
_of("cumsum", by=lambda x, axis, exclusive, reverse: _plain(x, exclusive, reverse).cumsum(axis).to(x.dtype))
_of("stack", by=lambda values, axis: torch.stack([each.int() for each in values], axis))
_of("concat", by=lambda values, axis, interleave: torch.cat(values, axis))
_of("linear", by=lambda x, weight, bias=None: F.linear(x, weight, bias))
_of("reduce_mean", by=lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims))
_of("reduce_max", by=lambda x, axes, keep_dims: x.amax(axes, keepdim=keep_dims))
_of(
    "scaled_dot_product_attention",
    by=lambda query, key, value: F.scaled_dot_product_attention(query, key, value),
)
_of("select", by=lambda cond, a, b: torch.where(cond, a, b))
_of("split", by=lambda x, axis, split_sizes=None, num_splits=None: (
    x.split(split_sizes, axis) if split_sizes else x.tensor_split(num_splits, axis)
))  # fmt: skip


@interprets
def cast(x: Tensor, dtype: str) -> Tensor:
    """Whole numbers of 16 bits go round, as in any processor, so that a token too large for them shows."""
    if dtype in KINDS:
        return x.to(KINDS[dtype])
    return torch.from_numpy(x.numpy().astype(np.int64).astype(WHOLE[dtype]).astype(np.int32))


@interprets
def matmul(x: Tensor, y: Tensor, transpose_x: bool, transpose_y: bool) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


@interprets
def layer_norm(x: Tensor, axes: Any, epsilon: Any, gamma: Any = None, beta: Any = None) -> Tensor:
    assert axes in ([-1], [x.ndim - 1])
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


@interprets
def gelu(x: Tensor, mode: str) -> Tensor:
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


@interprets
def gather(x: Tensor, indices: Tensor, axis: int, batch_dims: int, validate_indices: bool) -> Tensor:
    assert (axis, batch_dims) == (0, 0)
    return x[indices.long()]


@interprets
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int, validate_indices: bool) -> Tensor:
    assert batch_dims == 0
    return x[tuple(indices.long().unbind(-1))]


@interprets
def reduce_argmax(x: Tensor, axis: int, keep_dims: bool, output_dtype: str) -> Tensor:
    return x.argmax(axis, keepdim=keep_dims).int()


@interprets
def slice_by_index(
    x: Tensor, begin: Any, end: Any, stride: Any = None, begin_mask: Any = None, end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:  # fmt: skip
    none = [False] * x.ndim
    begin_mask, end_mask, squeeze_mask = (mask or none for mask in (begin_mask, end_mask, squeeze_mask))
    at: list[Any] = []
    for axis in range(x.ndim):
        if squeeze_mask[axis]:
            at.append(begin[axis])
        else:
            first, last = (None if begin_mask[axis] else begin[axis]), (None if end_mask[axis] else end[axis])
            at.append(slice(first, last, stride[axis] if stride else None))
    return x[tuple(at)]


@interprets
def conv(
    x: Tensor, weight: Tensor, strides: Any, pad_type: str, pad: Any, dilations: Any, groups: int,
    bias: Any = None,
) -> Tensor:  # fmt: skip
    assert pad_type in ("valid", "custom")
    sides = pad if pad_type == "custom" else [0] * 4
    x = F.pad(x, (sides[2], sides[3], sides[0], sides[1]))
    return F.conv2d(x, weight, bias, strides, 0, dilations, groups)


@interprets
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Any, scale_factor_width: Any) -> Tensor:
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)))


@interprets
def pad(x: Tensor, pad: Any, mode: str, constant_val: Any) -> Tensor:
    assert mode == "constant"
    pairs = [tuple(pad[i : i + 2]) for i in range(0, len(pad), 2)]
    return F.pad(x, [side for pair in reversed(pairs) for side in pair], value=float(constant_val))


@interprets
def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: Any
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))
