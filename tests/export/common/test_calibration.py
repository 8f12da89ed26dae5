"""What meets a weight, and rounding that makes up for its own errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import tiny
from fewstep.export.common import graphs
from fewstep.export.common import sensitivity as sensitivity_module
from fewstep.export.common.calibration import DAMPING, POSITIONS, TOKENS, CalibrationStats, collect_stats
from fewstep.export.common.gptq import GROUP, to_groups
from fewstep.export.common.onnx_quantize import QuantSpec, quantize_dequantize, quantize_weights
from fewstep.export.common.sensitivity import calibrate, sensitivity
from fewstep.families import sd3


def alike(rows: int, seed: int) -> np.ndarray:
    """Inputs of 128 that a layer has in truth: few causes, many numbers."""
    causes = np.random.default_rng(0).standard_normal((12, 128))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 12)) @ causes + 0.3 * rng.standard_normal((rows, 128))
    return x.astype(np.float32)


def weight(rows: int = 96, columns: int = 128) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_errors_make_up_for_one_another_on_inputs_never_seen(bits: int) -> None:
    matrix, x, other = weight(), alike(512, 1), alike(512, 2)
    met = CalibrationStats(matrix, x.T @ x)
    alone, _ = quantize_dequantize(matrix, QuantSpec(bits))
    fed, size = quantize_dequantize(matrix, QuantSpec(bits, met))
    assert size == quantize_dequantize(matrix, QuantSpec(bits))[1]
    lost = [np.square(other @ (back - matrix).T).mean() for back in (alone, fed)]
    assert lost[1] < 0.5 * lost[0]
    assert met.output_error(fed) == pytest.approx(
        np.square(x @ (fed - matrix).T, dtype=float).sum(), rel=1e-3
    )


def test_of_inputs_that_have_nothing_in_common_each_code_is_the_nearest() -> None:
    matrix = weight()
    factor = CalibrationStats(matrix, 7 * np.eye(128, dtype=np.float32)).factor()
    for ours, plain in zip(to_groups(matrix, 4, factor), to_groups(matrix, 4), strict=True):
        np.testing.assert_array_equal(ours, plain)


def column_by_column(matrix: np.ndarray, gram: np.ndarray, bits: int) -> np.ndarray:
    """The method as its paper writes it down before any speeding up: after each column what is left of the
    inverse belongs to the columns behind it."""
    left, half = matrix.astype(np.float64), 2 ** (bits - 1)
    own, mean = DAMPING
    damped = gram + np.diag(own * gram.diagonal() + mean * gram.diagonal().mean())
    inverse = np.linalg.inv(damped)
    for at in range(len(gram)):
        if at % GROUP == 0:
            _, scale, _ = to_groups(left[:, at : at + GROUP].astype(np.float32), bits)
        column = left[:, at : at + 1].copy()
        left[:, at : at + 1] = np.rint(column / scale).clip(-half, half - 1) * scale
        error = (column - left[:, at : at + 1]) / inverse[at, at]
        left[:, at + 1 :] -= error * inverse[at, at + 1 :]
        inverse -= np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    return left


@pytest.mark.parametrize("bits", [2, 4])
def test_all_columns_behind_make_up_for_an_error_not_their_group_alone(bits: int) -> None:
    matrix, x = weight(columns=256), np.hstack([alike(512, seed) for seed in (1, 2)])
    x[:, 128:] += x[:, :128]  # so that groups have to do with one another
    gram = x.T @ x
    back, _ = quantize_dequantize(matrix, QuantSpec(bits, CalibrationStats(matrix, gram)))
    known = column_by_column(matrix, gram.astype(np.float64), bits)
    assert np.isclose(back, known, atol=1e-4).mean() > 0.98  # where both are near a middle, either may be
    lost = [float(np.square(x @ (each - matrix).T).sum()) for each in (back, known)]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)


def test_what_was_not_seen_is_not_given_up_for_what_was() -> None:
    """Fewer inputs than a weight has columns: what no input tells apart must not run away."""
    matrix, x, other = weight(), alike(24, 1), alike(512, 2)
    lost = [
        np.square(other @ (quantize_dequantize(matrix, how)[0] - matrix).T).mean()
        for how in (QuantSpec(4), QuantSpec(4, CalibrationStats(matrix, x.T @ x)))
    ]
    assert lost[1] < 0.8 * lost[0]


def test_a_large_input_does_not_drown_the_others() -> None:
    matrix, x, other = weight(), alike(512, 1), alike(512, 2)
    for inputs in (x, other):
        inputs[:, 0] *= 100
    back, _ = quantize_dequantize(matrix, QuantSpec(4, CalibrationStats(matrix, x.T @ x)))
    alone, _ = quantize_dequantize(matrix, QuantSpec(4))
    lost = [np.square(other @ (each - matrix).T).mean() for each in (alone, back)]
    assert lost[1] < 0.05 * lost[0]


def test_weights_at_the_end_of_float16_stay_finite() -> None:
    """What the second group is left to make up for is larger than any weight."""
    matrix, x = 6e4 * np.sign(weight()), alike(256, 1)
    matrix[:, ::3] *= 0.5
    x[:, GROUP:] = x[:, :GROUP]
    with np.errstate(all="raise"):
        back, _ = quantize_dequantize(matrix, QuantSpec(2, CalibrationStats(matrix, x.T @ x)))
    assert np.square(back - matrix).mean() < np.square(matrix).mean()


@pytest.mark.parametrize("square", [False, True])
def test_a_graph_that_turned_the_weight_rounds_it_the_same(square: bool) -> None:
    """An exporter stores ``[I, O]`` where torch has ``[O, I]``."""
    matrix, x = weight(128 if square else 96), alike(256, 1)
    how = QuantSpec(4, CalibrationStats(matrix, x.T @ x))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    turned = numpy_helper.from_array(np.ascontiguousarray(matrix.T), "matrix")
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [turned])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    small = quantize_weights(model, 8, lambda array: how)
    (unpacked,) = ReferenceEvaluator(small).run(None, {"x": np.eye(128, dtype=np.float32)})
    np.testing.assert_allclose(np.asarray(unpacked).T, quantize_dequantize(matrix, how)[0], atol=1e-6)


def test_inputs_that_no_group_fits_are_rounded_by_themselves() -> None:
    matrix, x = weight(GROUP, 72), alike(256, 1)[:, :72]
    how = QuantSpec(4, CalibrationStats(matrix, x.T @ x))
    np.testing.assert_array_equal(
        quantize_dequantize(matrix, how)[0], quantize_dequantize(matrix, QuantSpec(4))[0]
    )


class Net(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 12, 3, stride=stride, padding=1, bias=False)
        self.linear = nn.Linear(12, 5, bias=False)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.linear(self.conv(x).movedim(1, -1))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_inputs_foretell_what_an_error_does(stride: int) -> None:
    net, rng = Net(stride), np.random.default_rng(0)
    seen: list[Any] = []
    with torch.no_grad(), collect_stats({"net": net}) as told:
        hook = net.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for _ in range(3):
            net(torch.from_numpy(rng.standard_normal((2, 8, 16, 16)).astype(np.float32)))
        met = told()
    hook.remove()
    assert set(met) == {("net", "conv.weight"), ("net", "linear.weight")}  # not what nothing met
    kernel, matrix = met["net", "conv.weight"], met["net", "linear.weight"]
    # All of a plane so small is taken: the convolution's outputs are what the linear layer was given.
    outputs = sum(float(x.double().square().sum()) for x in seen)
    assert kernel.output_error(np.zeros_like(kernel.weight)) == pytest.approx(outputs, rel=1e-4)
    rows = torch.cat([x.reshape(-1, 12) for x in seen]).numpy()
    np.testing.assert_allclose(matrix.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        net(torch.ones(1, 8, 16, 16))
    assert np.array_equal(told()["net", "linear.weight"].gram, matrix.gram)  # nobody observes any more


def test_of_a_large_plane_places_of_both_parities_are_taken() -> None:
    """Rows of zeros in every other place, as an upsampling may leave: half of what is taken."""
    side = 8 * POSITIONS
    conv = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.zeros(1, 1, side, side)
    x[:, :, ::2] = 1
    with torch.no_grad(), collect_stats({"net": conv}) as told:
        conv(x)
        met = told()
    total = float(met["net", "weight"].gram[0, 0])
    assert POSITIONS**2 / 4 < total < POSITIONS**2
    assert total == pytest.approx((side // 9 + 1) ** 2 / 2, rel=0.1)


def test_of_a_long_row_some_tokens_are_taken() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad(), collect_stats({"net": layer}) as told:
        layer(torch.ones(2, 8 * TOKENS, 1))
        taken = float(told()["net", "weight"].gram[0, 0])
        layer(torch.ones(2, TOKENS, 1))
        assert float(told()["net", "weight"].gram[0, 0]) == taken + 2 * TOKENS
    assert taken == 2 * (8 * TOKENS // 9 + 1)


def test_prompts_drawn_together_or_apart_bring_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    family = sd3.assemble(tiny.parts(with_t5=False), name="small", steps=2, guidance=None)
    parts, prompts = graphs.parts(family), ["a disc", "a disc", "a ring"]
    together = calibrate(family, parts, prompts)
    monkeypatch.setattr(sensitivity_module, "PIXELS", 1)
    apart = calibrate(family, parts, prompts)
    assert set(apart) == set(together)
    for key, each in apart.items():
        np.testing.assert_allclose(each.gram, together[key].gram, rtol=1e-3, atol=1e-4 * each.gram.max())
    noise, once = ("transformer", "net.pos_embed.proj.weight"), calibrate(family, parts, ["a disc"])
    twice = calibrate(family, parts, ["a disc"] * 2)
    assert not np.allclose(twice[noise].gram, 2 * once[noise].gram, rtol=0.05)  # each has noise of its own


def test_every_layer_of_a_model_is_observed_and_costs_less() -> None:
    family = sd3.assemble(tiny.parts(with_t5=False), name="small", steps=3, guidance=None)
    parts = graphs.parts(family)
    met = calibrate(family, parts, [f"a disc {i}" for i in range(18)])
    layers = {
        (graph, f"{name}.weight")
        for graph, part in parts.items()
        for name, layer in part.module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert set(met) == layers
    for (graph, name), each in met.items():
        inputs = each.weight[0].size
        assert each.gram.shape == (inputs, inputs), (graph, name)
        assert np.array_equal(each.weight, parts[graph].module.get_parameter(name).detach().numpy())
    x = torch.from_numpy(alike(256, 1))
    net = nn.Linear(128, 96)
    with torch.no_grad(), collect_stats({"net": net}) as told:
        net(x)
        its = {name: each for (_, name), each in told().items()}
    (plain,) = sensitivity("net", net, lambda: net(x))
    (fed,) = sensitivity("net", net, lambda: net(x), inputs=its)
    assert fed.bytes == plain.bytes
    assert all(fed.errors[bits] < plain.errors[bits] for bits in (2, 3, 4, 5, 6))
