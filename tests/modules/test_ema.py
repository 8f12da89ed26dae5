"""Averages: torch's own, in float32, and in and out of the net without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from fewstep.modules.ema import EMA


def stirred(net: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def test_it_is_torchs_average_to_the_bit() -> None:
    net = torch.nn.Linear(3, 3)

    def average(old: Any, new: Any, count: Any) -> None:
        torch._foreach_lerp_(old, new, 1 - min(0.9, (1 + int(count)) / (10 + int(count))))

    theirs, mine = AveragedModel(net, multi_avg_fn=average), EMA(dict(net.named_parameters()), 0.9)
    for seed in range(200):
        stirred(net, seed)
        theirs.update_parameters(net)
        mine.update()
    for name, value in mine.values.items():
        assert torch.equal(value, theirs.module.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_and_out_leaves_both_as_they_were(dtype: Any) -> None:
    net = torch.nn.Linear(8, 8).to(dtype)
    average = EMA(dict(net.named_parameters()), 0.5)
    for seed in range(5):
        stirred(net, seed)
        average.update()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    values = {name: value.clone() for name, value in average.values.items()}
    with pytest.raises(KeyError), average.applied():
        for name, p in net.named_parameters():
            assert torch.equal(p, values[name].to(dtype)) and not torch.equal(p, before[name])
        raise KeyError
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(average.values[name], values[name]) and values[name].dtype == torch.float32
    average.copy_to_model()
    assert all(torch.equal(p, values[name].to(dtype)) for name, p in net.named_parameters())


def test_a_net_in_bf16_is_averaged_finer_than_it_is() -> None:
    net = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    average = EMA(dict(net.named_parameters()), 0.999)
    for _ in range(2000):
        average.update()
    with torch.no_grad():
        net.weight.fill_(1.0078125)  # the next bf16
    for _ in range(100):
        average.update()
    assert 1.0 < float(average.values["weight"]) < 1.0078125
