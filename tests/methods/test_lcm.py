"""Consistency distillation on the closed-form mixture, and its target."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core import flow, sampling, schedule
from fewstep.core.types import Batch
from fewstep.methods.lcm import LCM, ConsistencyLoss, Target, consistency_distance
from fewstep.train.checkpoint import save
from fewstep.train.run import Run, TrainOptions
from fewstep.train.train_step import State, draw
from mixture import energy_distance, line, ring
from points import net, none, taught, walked

STUDENTS = 32
"""Steps of the teacher in the tests of the target."""


def flow_map(x: Any, t: Any, cond: Any) -> Any:
    """The velocity whose clean estimate is the end of the teacher's trajectory, by Runge and Kutta."""
    teacher, steps, y = line(), 64, x
    for i in range(steps):
        a, b = t * (1 - i / steps), t * (1 - (i + 1) / steps)
        h, middle = (b - a)[:, None], (a + b) / 2
        k1 = teacher(y, a, cond)
        k2 = teacher(y + h / 2 * k1, middle, cond)
        k3 = teacher(y + h / 2 * k2, middle, cond)
        k4 = teacher(y + h * k3, b, cond)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return (x - y) / t.clamp(min=1e-6)[:, None]


@pytest.mark.parametrize("loss", ["l2", "pseudo-huber"])
def test_the_teachers_own_flow_map_is_consistent_as_its_steps_get_fine(loss: ConsistencyLoss) -> None:
    truth = line()
    batch = Batch(torch.from_numpy(truth.sample(2000, 1)).double(), truth.cond(2000).map(torch.from_numpy))

    def told(velocity: Any, steps: int) -> float:
        method = LCM(torch.nn.Identity(), velocity, truth, schedule.grid(steps, 1.0), None, loss)
        return float(method.losses(batch, draw(0, 0, 0))["consistency"])

    losses = [told(flow_map, steps) for steps in (8, 32, 128)]
    # An Euler step errs by its length squared: the error falls by 16, and its square by 256.
    least = 100 if loss == "l2" else 8
    assert losses[0] > least * losses[1] > least**2 * losses[2]
    assert told(truth, 32) > 10 * losses[1]  # the teacher's own estimates do not agree


def test_the_target_is_the_average_of_all_students() -> None:
    student, start = net(1, 16, 2), net(2, 16, 2)
    target = Target(copy.deepcopy(start), start, 0.8)
    method = LCM(student, student, ring(), schedule.grid(4), target)
    seen: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for step in range(7):
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape))
            seen.append([p.clone() for p in student.parameters()])
            assert method.move_target(draw(0, step, 1)) == ()
    for place, own in enumerate(target.net.parameters()):
        expected = 0.8**7 * list(start.parameters())[place]
        for step, student_then in enumerate(seen):
            expected = expected + 0.2 * 0.8 ** (6 - step) * student_then[place]
        assert torch.allclose(own, expected, atol=1e-5)


def test_a_target_that_is_the_student_is_none() -> None:
    student, batch = net(1, 16, 2), walked(8)(8)(0, draw(0, 0, 0).share)
    grid = schedule.grid(STUDENTS)
    copied = copy.deepcopy(student)
    gradients: list[list[torch.Tensor]] = []
    for target in (None, Target(copied, copied, 0.5)):
        student.zero_grad()
        LCM(student, student, ring(), grid, target).losses(batch, draw(0, 0, 0))["consistency"].backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))
    assert all(p.grad is None for p in copied.parameters())


def run(folder: Path) -> Run:
    student = net(1, 16, 2)
    target = copy.deepcopy(student)
    method = LCM(student, student, ring(), schedule.grid(STUDENTS), Target(target, target, 0.9))
    options = TrainOptions(6, 1e-2, warmup=1, precision="fp32", device="cpu")
    return Run("x", folder, method, walked(8)(8), options, {"recipe": "x"}, averaged=["student"])


def test_a_resumed_run_has_the_target_of_the_whole_one(tmp_path: Path) -> None:
    whole = State(run(tmp_path / "whole"))
    for _ in range(6):
        whole.train_step()
    cut = State(run(tmp_path / "cut"))
    for _ in range(3):
        cut.train_step()
    save(tmp_path / "cut", cut.all(), cut.step)
    resumed = State(run(tmp_path / "cut"))
    assert resumed.step == 3
    for _ in range(3):
        resumed.train_step()
    for name in ("student", "target"):
        pairs = zip(whole.nets[name].parameters(), resumed.nets[name].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs), name
    assert not torch.equal(next(whole.nets["student"].parameters()), next(whole.nets["target"].parameters()))


def test_a_large_error_counts_by_its_size_and_a_small_one_by_its_square() -> None:
    direction = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float(consistency_distance(0 * direction, "pseudo-huber")) == 0
    huber, squares = (
        [float(consistency_distance(size * direction, loss)) for size in (1e-6, 2e-6, 1e3, 2e3)]
        for loss in ("pseudo-huber", "l2")
    )
    assert huber[1] / huber[0] == pytest.approx(4, rel=0.05)
    assert huber[3] / huber[2] == pytest.approx(2, rel=1e-4)
    assert huber[3] == pytest.approx(
        float((2e3 * direction).square().flatten(1).mean(1).sqrt().mean()), rel=1e-3
    )
    assert squares[1] / squares[0] == pytest.approx(4) == squares[3] / squares[2]


@pytest.mark.slow(5)
def test_a_student_of_one_step_is_far_better_than_its_teachers_one(tmp_path: Path) -> None:
    student = net(0, 64, 3)
    target = copy.deepcopy(student)
    method = LCM(student, student, ring(), schedule.grid(STUDENTS), Target(target, target))
    kept = taught(tmp_path, method, walked(8192)(256), 1000, 3e-3)
    start = torch.from_numpy(sampling.batch_noise(range(4000), (2,)))
    t = torch.ones(4000)

    def apart(velocity: Any) -> float:
        with torch.no_grad():
            drawn = flow.to_x0(start, velocity(start, t, none(4000)), t)
        return energy_distance(drawn.numpy(), ring().sample(4000, 99))

    assert apart(kept["student"]) < 0.2 * apart(ring())
