"""A net without its modulations is the net, for both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
import tiny_flux
from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.modules.adaln import PrecomputedAdaLN, split_modulation

PROMPTS = ["a cat", "two dogs", "x"]


@pytest.fixture(scope="module")
def small() -> Family:
    return sd3.assemble(tiny.parts(with_t5=False), name="small")


def drawn(family: Family, velocity: Any, prompts: list[str]) -> Any:
    noise = family.from_numpy(sampling.batch_noise(range(len(prompts)), family.latent))
    with torch.no_grad():
        return sampling.sample_flow(velocity, noise, schedule.grid(4), family.text(prompts))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_walk_with_hoisted_modulations_is_the_walk_to_the_bit(
    small: Family, rows: int, guidance: float
) -> None:
    with torch.no_grad():
        null = small.text([""])
    net: Any = small.velocity
    plain, hoist = (Guided(velocity, null, guidance) for velocity in (net, PrecomputedAdaLN(net)))
    expected = drawn(small, plain, PROMPTS[:rows])
    assert expected.std() > 0.1
    assert torch.equal(drawn(small, hoist, PROMPTS[:rows]), expected)


def test_the_net_given_its_modulations_holds_no_weight_of_theirs(small: Family) -> None:
    modulation, body = split_modulation(small.net)
    mine, rest = ({id(p) for p in module.parameters()} for module in (modulation, body))
    assert not mine & rest
    assert mine | rest == {id(p) for p in small.net.parameters()}  # nor is one copied or lost
    assert all(isinstance(block.norm1.linear, torch.nn.Linear) for block in small.blocks)  # left as it was


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_flux_falls_in_two_as_well(kind: Any) -> None:
    family = flux.assemble(tiny_flux.parts(kind), name="small", side=8)
    velocity: Any = family.velocity
    expected = drawn(family, velocity, PROMPTS)
    assert torch.equal(drawn(family, PrecomputedAdaLN(velocity), PROMPTS), expected)


def test_what_modulates_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no modulations"):
        split_modulation(torch.nn.Linear(2, 2))
