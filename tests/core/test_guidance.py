from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fewstep.core import sampling, schedule
from fewstep.core.guidance import Guided
from fewstep.core.types import Cond, UserError, Velocity
from mixture import energy_distance, images, ring


class Counted:
    """A velocity that notes the batches it is called with."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.batches: list[int] = []

    def __call__(self, x_t: Any, t: Any, cond: Cond) -> Any:
        self.batches.append(len(x_t))
        assert len(t) == len(cond) == len(x_t)
        return self.velocity(x_t, t, cond)


def inputs(n: int = 4) -> tuple[Any, Any, Any, Cond]:
    teacher = images()
    x = sampling.batch_noise(range(n), (2, 4, 4))
    return teacher, x, np.full(n, 0.6, np.float32), teacher.cond(n, mode=1)


def test_scale_one_is_no_guidance_and_no_second_pass() -> None:
    teacher, x, t, cond = inputs()
    net = Counted(teacher)
    v = Guided(net, teacher.cond(1), 1.0)(x, t, cond)
    assert (v == teacher(x, t, cond)).all()
    assert net.batches == [4]


@pytest.mark.parametrize("scale", [0.0, 2.0, 4.5])
@pytest.mark.parametrize("rows", [1, 4])
def test_guidance_is_its_formula_in_one_call(scale: float, rows: int) -> None:
    teacher, x, t, cond = inputs()
    net = Counted(teacher)
    v = Guided(net, teacher.cond(rows), scale)(x, t, cond)
    with_cond, without = teacher(x, t, cond), teacher(x, t, teacher.cond(4))
    np.testing.assert_allclose(v, without + scale * (with_cond - without), atol=1e-5)
    assert net.batches == [8]


def test_torch_agrees() -> None:
    import torch

    teacher, x, t, cond = inputs()
    ours = Guided(teacher, teacher.cond(1), 3.0)(x, t, cond)
    uncond = teacher.cond(1).map(torch.from_numpy)
    theirs = Guided(teacher, uncond, 3.0)(
        torch.from_numpy(x), torch.from_numpy(t), cond.map(torch.from_numpy)
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_a_guided_pair_is_a_velocity_that_walks_to_its_mode() -> None:
    teacher, n = ring(), 500
    guided = Guided(teacher, teacher.cond(1), 1.5)
    assert isinstance(guided, Velocity)
    x, cond = sampling.batch_noise(range(n), (2,)), teacher.cond(n, mode=3)
    out = sampling.sample_flow(guided, x, schedule.grid(64), cond)
    there = np.linalg.norm(out - teacher.means[3], axis=1)
    assert (there < 1.0).mean() > 0.95
    assert energy_distance(out, teacher.sample(n, seed=1)) > 1  # one mode, not the ring


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_one_clear_line(scale: float) -> None:
    with pytest.raises(UserError, match="guidance"):
        Guided(images(), images().cond(1), scale)
