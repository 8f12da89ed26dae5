"""The student's trajectories: what is simulated, what is shared, and what a gradient moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.core import flow
from fewstep.core.types import Batch, BatchSlice
from fewstep.methods.anchor import anchored
from fewstep.methods.base import Losses, StepRandom, Update
from fewstep.methods.dmd import DMD, DistributionMatching, ProxyTarget, ScorePoint, moved
from fewstep.methods.rollout import Rollout, rollouts
from fewstep.methods.tdm import TDM
from fewstep.methods.trajectory import trajectory_loss
from fewstep.train.train_step import draw
from mixture import ring
from points import GRID, net, walked


def batch(n: int = 8) -> Batch:
    return walked(n)(n)(0, BatchSlice())


def test_a_simulated_step_is_a_step_and_simulates_no_more_than_it_needs() -> None:
    calls: list[float] = []
    student = net(1, 16, 2)

    def counted(x: Any, t: Any, cond: Any) -> Any:
        calls.append(float(t[0]))
        return student(x, t, cond)

    rollout = Rollout(counted, GRID)
    simulated = rollout.simulated_step(batch(), draw(0, 0, 0), 1)
    assert calls == pytest.approx(GRID[:2])
    step = rollout.step(batch(), draw(0, 0, 1), 1)
    assert torch.equal(simulated.x, step.x) and torch.allclose(simulated.v, step.v)
    assert step.v.requires_grad and not simulated.v.requires_grad
    calls.clear()
    rollout.finals(batch(), draw(0, 0, 2))
    assert calls == pytest.approx(GRID[2:4])  # the first two are known


def test_a_stochastic_rollout_renoises_each_estimate() -> None:
    """DMD2 (arXiv 2405.14867), section 4.5: x at the next time is the estimate, noised anew."""
    rollout = Rollout(net(1, 16, 2), GRID, sampler="renoise")
    states = rollout.states(batch(2000), draw(0, 0, 0))
    estimates = [rollout.simulated_step(batch(2000), draw(0, 0, 0), i).x0 for i in range(4)]
    for index in range(3):
        t = GRID[index + 1]
        noise = (states[index + 1] - (1 - t) * estimates[index]) / t
        assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
        assert abs(float((noise * estimates[index]).mean())) < 0.1  # it is fresh
    assert torch.equal(states[-1], estimates[-1])


def test_stochastic_rollouts_of_one_update_are_the_same_again() -> None:
    first, again, other = (
        Rollout(net(1, 16, 2), GRID, sampler="renoise").finals(batch(), draw(0, 3, update))
        for update in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_fresh_rollouts_share_no_noise_and_others_share_all() -> None:
    rollout = Rollout(net(1, 16, 2), GRID)
    for fresh in (False, True):
        own = rollouts(rollout, 3, fresh)
        starts = [each.states(batch(), draw(0, 0, number))[0] for number, each in enumerate(own)]
        assert torch.equal(starts[0], starts[1]) == (not fresh)
        assert torch.equal(starts[1], starts[2]) == (not fresh)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("method", ["dmd", "tdm"])
def test_the_proxys_updates_simulate_anew_where_asked(method: str, fresh: bool) -> None:
    begun: list[Any] = []
    student, proxy = net(1, 16, 2), net(2, 16, 2)

    def counted(x: Any, t: Any, cond: Any) -> Any:
        begun.extend([x] if float(t[0]) == 1 else [])
        return student(x, t, cond)

    matching = DistributionMatching(ring(), proxy, "shared", "finals")
    made: Any = {
        "dmd": DMD(student, counted, proxy, matching, GRID, 3, fresh_rollouts=fresh),
        "tdm": TDM(student, counted, proxy, proxy, ring(), GRID, 3, fresh_rollouts=fresh),
    }[method]
    for number, update in enumerate(made.updates(0)):
        if isinstance(update, Update) and update.net == "proxy":
            update.losses(batch(), draw(0, 0, number))
    assert len(begun) == (3 if fresh else 1)
    assert len({float(x.sum()) for x in begun}) == len(begun)


@pytest.mark.parametrize(("on", "factor"), [("state", "step"), ("x0", "time"), ("velocity", "one")])
@pytest.mark.parametrize("index", range(4))
def test_the_gradient_of_a_step_carries_what_it_is_taken_on(on: Any, factor: str, index: int) -> None:
    """The loss moves its argument by g, so the velocity gets g times the argument's derivative."""
    rollout = Rollout(net(1, 16, 2), GRID)
    step = rollout.step(batch(), draw(0, 0, 0), index)
    t = GRID[index + 1] or GRID[index] / 2
    g = torch.randn(step.x.shape, generator=torch.Generator().manual_seed(0))
    (moved(step, step.at(t), on) * g).sum().backward(inputs=[step.v])
    expected = {"step": GRID[index] - t, "time": GRID[index], "one": 1.0}[factor]
    assert step.v.grad is not None
    assert torch.allclose(-step.v.grad, expected * g, atol=1e-5)


def test_a_renoised_point_has_no_gradient_on_a_state() -> None:
    with pytest.raises(ValueError, match="no state"):
        DistributionMatching(ring(), ring(), "renoise", "finals", gradient_on="state")


POINTS: tuple[ScorePoint, ...] = ("shared", "shared-free")


@pytest.mark.parametrize("point", POINTS)
def test_a_proxy_on_the_path_is_trained_where_it_is_asked(point: ScorePoint) -> None:
    """Training and comparison draw from one law: points of the trajectory, with the student's own noise."""
    asked: list[tuple[Any, Any]] = []

    def proxy(x: Any, t: Any, cond: Any) -> Any:
        asked.append((x, t))
        return torch.zeros_like(x)

    rollout = Rollout(net(1, 16, 2), GRID)
    target: ProxyTarget = "path"
    matching = DistributionMatching(ring(), proxy, point, target)
    for number in range(6):
        asked.clear()
        matching.proxy_loss(rollout, batch(), draw(0, 0, number))
        matching.student_loss(rollout, batch(), draw(0, 0, number))  # the same draws
        (x, t), (y, s) = asked
        assert torch.allclose(t, s) and torch.allclose(x, y, atol=1e-5)


def test_the_targets_of_a_proxy_on_the_path_are_the_students_own_velocities() -> None:
    """Noise minus estimate is v itself, so the loss of a proxy that equals the student is 0."""
    student = net(1, 16, 2)

    def straight(x: Any, t: Any, cond: Any) -> Any:
        return velocities[0]

    rollout = Rollout(student, GRID)
    matching = DistributionMatching(ring(), straight, "shared", "path")
    step = rollout.simulated_step(batch(), draw(0, 0, 0), rollout.pick(draw(0, 0, 0)))
    velocities = [step.v]
    assert torch.allclose(flow.to_noise(step.x, step.v, step.t) - step.x0, step.v, atol=1e-5)
    assert float(matching.proxy_loss(rollout, batch(), draw(0, 0, 0))["proxy"]) < 1e-9


def test_an_anchor_adds_its_weighted_loss_and_nothing_at_weight_0() -> None:
    student = net(1, 16, 2)

    def nothing(batch: Any, random: StepRandom) -> Losses:
        return {"own": torch.zeros(())}

    update = Update("student", nothing)
    assert anchored(update, student, GRID, 0.0) is update
    terms = anchored(update, student, GRID, 3.0).losses(batch(), draw(0, 0, 0))
    alone = trajectory_loss(student, GRID, range(4), batch(), draw(0, 0, 0))["trajectory"]
    assert terms.keys() == {"own", "trajectory"}
    assert torch.allclose(terms["trajectory"], 3 * alone)
