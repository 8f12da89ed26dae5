"""Every distillation on the closed-form mixture: who learns, what a loss is at the truth, and the whole
chain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.core import flow, losses
from fewstep.core.types import Batch, BatchSlice, UserError
from fewstep.methods.base import Update
from fewstep.methods.dmd import DistributionMatching
from fewstep.methods.rollout import Rollout
from fewstep.methods.split import Split
from fewstep.methods.tdm import forward_diffuse
from fewstep.methods.trajectory import Trajectory
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps
from fewstep.modules.timestep_experts import TimestepExperts, merge
from fewstep.train.run import Run, TrainOptions
from fewstep.train.train_step import State, draw
from mixture import ring
from points import GRID, flash, methods, net, none, quality, taught, walked

pytestmark = pytest.mark.slow(35)


def batch(n: int = 8) -> Batch:
    return walked(n)(n)(0, BatchSlice())


@pytest.mark.parametrize("name", methods())
def test_a_turn_changes_just_the_net_that_it_names(name: str, tmp_path: Path) -> None:
    method = methods()[name]
    names = {turn.net for turn in method.updates(0)}
    assert names == set(method.nets)  # every net learns, and no other
    for turn in method.updates(0):

        class Alone:
            nets = method.nets
            updates = staticmethod(lambda step, turn=turn: [turn])

        options = TrainOptions(5, 1e-2, warmup=0.2, precision="fp32", device="cpu")
        state = State(Run("x", tmp_path, Alone(), walked(8)(8), options, {"recipe": "x"}, averaged=[]))
        before = {n: [p.clone() for p in part.parameters()] for n, part in method.nets.items()}
        for _ in range(3):
            state.train_step()
        moved = {
            n
            for n, part in method.nets.items()
            if any(not torch.equal(p, q) for p, q in zip(before[n], part.parameters(), strict=True))
        }
        if isinstance(turn, Update):
            assert moved == {turn.net}, turn.net
        else:
            assert moved <= {turn.net}
        for part in method.nets.values():
            part.requires_grad_(True)


@pytest.mark.parametrize("name", methods())
def test_no_gradient_reaches_a_teacher_with_weights(name: str) -> None:
    teacher, method = net(9, 16, 2), methods()[name]
    parts = [method, *(getattr(method, n, None) for n in ("matching", "flash", "adversarial"))]
    parts += [getattr(method.flash, "matching", None)] if hasattr(method, "flash") else []
    for part in parts:
        if hasattr(part, "teacher"):
            object.__setattr__(part, "teacher", teacher)
    for number, turn in enumerate(method.updates(0)):
        if isinstance(turn, Update):
            for other, part in method.nets.items():
                part.requires_grad_(other == turn.net)
            sum(v for v in turn.losses(batch(), draw(0, 0, number)).values() if v.requires_grad).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_the_matching_gradient_is_the_difference_of_the_scores() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    proxy, teacher, mine = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1))
    losses.distribution_matching(x, proxy, teacher, mine).backward()
    size = (mine - teacher).abs().mean(1, keepdim=True)
    # The loss is a mean over samples and their values.
    assert torch.allclose(x.grad * 12, (proxy - teacher) / size, atol=1e-5)


@pytest.mark.parametrize("where", ["shared", "shared-free", "renoise"])
def test_who_draws_the_truth_is_not_moved(where: Any) -> None:
    student = net(1, 16, 2)
    matching = DistributionMatching(ring(), ring(), where)
    told = matching.student_loss(Rollout(student, GRID), batch(), draw(0, 0, 0))["matching"]
    assert float(told.detach()) < 1e-10  # the proxy is the teacher: no difference


@pytest.mark.parametrize("index", range(4))
def test_a_state_of_the_path_is_a_mixture_of_the_students_own_data_and_noise(index: int) -> None:
    rollout = Rollout(net(1, 16, 2), GRID)
    states, move = rollout.states(batch(), draw(0, 0, 0)), rollout.step(batch(), draw(0, 0, 1), index)
    assert torch.allclose(move.at(GRID[index + 1]), states[index + 1], atol=1e-5)
    assert torch.allclose(move.at(GRID[index]), states[index], atol=1e-5)
    assert torch.allclose(move.end, states[index + 1], atol=1e-6)
    assert move.end.requires_grad and not states[index].requires_grad
    assert torch.allclose(rollout.finals_with_grad(batch(), draw(0, 0, 1)), states[-1], atol=1e-6)


def test_shares_make_the_walks_of_the_whole() -> None:
    student = net(1, 16, 2)
    whole = Rollout(student, GRID).finals(walked(8)(8)(3, BatchSlice()), draw(0, 3, 0))
    rollout = Rollout(student, GRID)
    parts = [
        rollout.finals(walked(8)(8)(3, BatchSlice(i, 2)), draw(0, 3, 0, BatchSlice(i, 2))) for i in range(2)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_noise_carried_on_is_noise_at_once_and_its_velocity_the_truths() -> None:
    truth, n = ring(), 200_000
    x0, first, more = (torch.randn(n, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x0 = torch.from_numpy(truth.sample(n, 1))
    t = torch.full((n,), 0.7)
    x_t, v = forward_diffuse(flow.interpolate(x0, first, 0.4), more, 0.4, t)
    at_once = flow.interpolate(x0, first, 0.7)
    assert torch.allclose(x_t.std(0), at_once.std(0), rtol=0.01)
    # The mean of v given x_t is the true velocity: the error is orthogonal to every function of x_t.
    error = v - truth(x_t, t, none(n))
    for direction in (x_t, x_t.flip(1), torch.sin(2 * x_t), torch.ones_like(x_t)):
        assert abs(float((error * direction).mean())) < 0.02 * float(direction.abs().mean())


def test_taps_read_and_leave_no_trace() -> None:
    tapped = net(1, 16, 2)
    taps = FeatureTaps(tapped, tapped.blocks)
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    features = taps(x, t, none(3))
    assert [f.shape for f in features] == [(3, 1, 16), (3, 1, 16)]
    assert torch.equal(tapped.layers[-1](features[-1][:, 0]), tapped(x, t, none(3)))
    assert not any(block._forward_hooks for block in tapped.blocks)


def test_a_renewed_head_forgets_and_the_others_do_not() -> None:
    heads = DiscriminatorHeads([4, 4])
    before = [p.clone() for p in heads.parameters()]
    with torch.no_grad():
        fresh = heads.reset_head(1, torch.Generator().manual_seed(5))
    half = len(before) // 2
    assert all(torch.equal(p, q) for p, q in zip(before[:half], heads.heads[0].parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(before[half:], fresh, strict=True))


def test_branches_answer_for_their_times_and_merge_between_them() -> None:
    early, late = net(1, 16, 2), net(2, 16, 2)
    both, x = TimestepExperts(early, late), torch.randn(4, 2)
    for t, mine in ((0.5, early), (0.75, late)):
        times = torch.full((4,), t)
        assert torch.equal(both(x, times, none(4)), mine(x, times, none(4)))
    with pytest.raises(ValueError, match="both sides"):
        both(x, torch.tensor([0.4, 0.6, 0.4, 0.6]), none(4))
    for ratio, same in ((0.0, early), (1.0, late)):
        merged = merge(early.state_dict(), late.state_dict(), ratio)
        assert all(torch.allclose(merged[k], v, atol=1e-7) for k, v in same.state_dict().items())


def test_two_steps_have_nothing_to_split() -> None:
    early, late = net(1, 16, 2), net(2, 16, 2)
    part = flash(early, TimestepExperts(early, late), net(3, 16, 2))
    object.__setattr__(part, "grid", [1.0, 0.75, 0.0])
    with pytest.raises(UserError, match="nothing to split"):
        Split(early, late, part)


def learnt_proxy(folder: Path, batches: Any) -> Any:
    """A teacher with weights: the ring's flow, learnt."""
    from fewstep.core.schedule import uniform
    from fewstep.methods.flow_matching import FlowMatching

    proxy = net(5)
    return taught(folder, FlowMatching(proxy, proxy, uniform), batches, 1200, 3e-3)["net"]


def test_the_chain_of_flash_draws_the_ring_in_four_steps(tmp_path: Path) -> None:
    """The bars: energy distance at most .005 (the teacher's own four steps: .086), every mode within 20 %
    of its weight, at most 2 % of the samples off every mode; and not worse than the warm start on any of
    the three."""
    data, student = walked(65_536), net()
    warm = taught(tmp_path / "1", Trajectory(student, student, GRID), data(512), 2500, 4e-3)["student"]
    proxy = learnt_proxy(tmp_path / "p", data(512))
    rates = {"proxy": 1e-3, "heads": 1e-3}

    student = copy.deepcopy(warm)
    one = flash(student, student, copy.deepcopy(proxy), proxy_updates=2, trajectory_weight=3.0)
    matched = taught(tmp_path / "2", one, data(512), 200, 2e-4, rates)["student"]

    early, late = copy.deepcopy(matched), copy.deepcopy(matched)
    part = flash(
        early, TimestepExperts(early, late), copy.deepcopy(proxy), proxy_updates=2, trajectory_weight=3.0
    )
    halves = taught(tmp_path / "3", Split(early, late, part), data(512), 60, 1e-4, rates)
    student = net()
    student.load_state_dict(merge(halves["early"].state_dict(), halves["late"].state_dict(), 0.7))

    teachers, before, after = quality(ring()), quality(warm), quality(student)
    assert teachers.distance > 0.05
    assert after.distance <= 0.005
    assert after.weight <= 0.2
    assert after.off <= 0.02
    # Not worse than the warm start, within what 16,000 samples can tell.
    assert after.distance <= before.distance + 0.0005
    assert after.weight <= before.weight + 3 * (7 / 16_000) ** 0.5
    assert after.off <= before.off + 2 * (before.off / 16_000) ** 0.5


def test_renoised_estimates_are_where_they_are_said_to_be() -> None:
    """``shared`` takes the scores on the path without noise: the same point whatever the turn's noise."""
    student = net(1, 16, 2)
    seen: dict[str, list[Any]] = {"shared": [], "renoise": []}

    def look(kind: str) -> Any:
        def velocity(x: Any, t: Any, cond: Any) -> Any:
            seen[kind].append(x)
            return x

        return velocity

    rollout = Rollout(student, GRID[:1] + GRID[-2:])
    rollout.states(batch(), draw(0, 0, 0))
    for kind in ("shared", "renoise"):
        for number in (1, 5):
            DistributionMatching(look(kind), look(kind), kind).student_loss(
                rollout, batch(), draw(0, 0, number)
            )  # type: ignore[arg-type]
    points = {kind: {tuple(np.round(x.flatten().tolist(), 5)) for x in xs} for kind, xs in seen.items()}
    assert len(points["shared"]) <= 2 < 1 + len(points["renoise"])


@pytest.mark.parametrize("where", ["shared", "shared-free", "renoise"])
@pytest.mark.parametrize("index", range(4))
def test_every_step_is_taught_wherever_the_scores_are_taken(where: Any, index: int) -> None:
    student, proxy = net(1, 16, 2), net(2, 16, 2)
    rollout = Rollout(student, GRID, trained_steps=(index,))
    DistributionMatching(ring(), proxy, where).student_loss(rollout, batch(), draw(0, 0, 0))[
        "matching"
    ].backward()
    assert sum(float(p.grad.abs().sum()) for p in student.parameters()) > 1e-3
