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
from fewstep.deploy.common import graphs
from fewstep.deploy.common.heard import SIDE, Heard, listening
from fewstep.deploy.common.sensitivity import heard, sensitivity
from fewstep.deploy.common.weights import GROUP, Choice, shrink, stored, to_groups
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
def test_errors_make_up_for_one_another_on_inputs_never_heard(bits: int) -> None:
    matrix, x, other = weight(), alike(512, 1), alike(512, 2)
    met = Heard(matrix, x.T @ x)
    alone, _ = stored(matrix, Choice(bits))
    fed, size = stored(matrix, Choice(bits, met))
    assert size == stored(matrix, Choice(bits))[1]
    lost = [np.square(other @ (back - matrix).T).mean() for back in (alone, fed)]
    assert lost[1] < 0.5 * lost[0]
    assert met.lost(fed) == pytest.approx(np.square(x @ (fed - matrix).T, dtype=float).sum(), rel=1e-3)


def test_of_inputs_that_have_nothing_in_common_each_code_is_the_nearest() -> None:
    matrix = weight()
    factor = Heard(matrix, 7 * np.eye(128, dtype=np.float32)).factor
    for ours, plain in zip(to_groups(matrix, 4, factor), to_groups(matrix, 4), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("square", [False, True])
def test_a_graph_that_turned_the_weight_rounds_it_the_same(square: bool) -> None:
    """An exporter stores ``[I, O]`` where torch has ``[O, I]``."""
    matrix, x = weight(128 if square else 96), alike(256, 1)
    how = Choice(4, Heard(matrix, x.T @ x))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    turned = numpy_helper.from_array(np.ascontiguousarray(matrix.T), "matrix")
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [turned])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    small = shrink(model, 8, lambda array: how)
    (unpacked,) = ReferenceEvaluator(small).run(None, {"x": np.eye(128, dtype=np.float32)})
    np.testing.assert_allclose(np.asarray(unpacked).T, stored(matrix, how)[0], atol=1e-6)


def test_inputs_that_no_group_fits_are_rounded_by_themselves() -> None:
    matrix = weight(GROUP, 72)
    how = Choice(4, Heard(matrix, np.eye(72, dtype=np.float32)))
    np.testing.assert_array_equal(stored(matrix, how)[0], stored(matrix, Choice(4))[0])


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
def test_what_is_heard_foretells_what_an_error_does(stride: int) -> None:
    net, rng = Net(stride), np.random.default_rng(0)
    seen: list[Any] = []
    with torch.no_grad(), listening({"net": net}) as told:
        hook = net.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for _ in range(3):
            net(torch.from_numpy(rng.standard_normal((2, 8, 16, 16)).astype(np.float32)))
        met = told()
    hook.remove()
    assert set(met) == {("net", "conv.weight"), ("net", "linear.weight")}  # not what nothing met
    kernel, matrix = met["net", "conv.weight"], met["net", "linear.weight"]
    # All of a plane so small is heard: the convolution's outputs are what the linear layer was given.
    outputs = sum(float(x.double().square().sum()) for x in seen)
    assert kernel.lost(np.zeros_like(kernel.weight)) == pytest.approx(outputs, rel=1e-4)
    rows = torch.cat([x.reshape(-1, 12) for x in seen]).numpy()
    np.testing.assert_allclose(matrix.gram, rows.T @ rows, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        net(torch.ones(1, 8, 16, 16))
    assert np.array_equal(told()["net", "linear.weight"].gram, matrix.gram)  # nobody listens any more


def test_a_large_plane_is_heard_at_places_of_both_parities() -> None:
    """Rows of zeros in every other place, as an upsampling may leave: half of what is heard."""
    side = 8 * SIDE
    conv = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.zeros(1, 1, side, side)
    x[:, :, ::2] = 1
    with torch.no_grad(), listening({"net": conv}) as told:
        conv(x)
        met = told()
    total = float(met["net", "weight"].gram[0, 0])
    assert SIDE**2 / 4 < total < SIDE**2
    assert total == pytest.approx((side // 9 + 1) ** 2 / 2, rel=0.1)


def test_every_layer_of_a_model_is_heard_and_costs_less() -> None:
    family = sd3.assemble(tiny.parts(with_t5=False), name="small", steps=3, guidance=None)
    parts = graphs.parts(family)
    met = heard(family, parts, [f"a disc {i}" for i in range(18)])
    assert {graph for graph, _ in met} == set(parts)
    for (graph, name), each in met.items():
        inputs = each.weight[0].size
        assert each.gram.shape == (inputs, inputs), (graph, name)
        assert np.array_equal(each.weight, parts[graph].module.get_parameter(name).detach().numpy())
    x = torch.from_numpy(alike(256, 1))
    net = nn.Linear(128, 96)
    with torch.no_grad(), listening({"net": net}) as told:
        net(x)
        its = {name: each for (_, name), each in told().items()}
    (plain,) = sensitivity("net", net, lambda: net(x))
    (fed,) = sensitivity("net", net, lambda: net(x), heard=its)
    assert fed.bytes == plain.bytes
    assert all(fed.errors[bits] < plain.errors[bits] for bits in (2, 3, 4, 5, 6))
