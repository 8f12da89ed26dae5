"""The adversarial loss: what its heads see, and whom it teaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fewstep.core import schedule
from fewstep.core.types import Batch
from fewstep.methods.base import InPlaceUpdate
from fewstep.methods.ladd import LADD, estimate_from_data
from fewstep.methods.rollout import Rollout
from fewstep.train.train_step import draw
from mixture import ring
from points import GRID, critic, net, none, walked

HIGH_NOISE = schedule.density("logit-normal", np.e)


def batch(n: int = 64) -> Batch:
    return Batch(torch.from_numpy(ring().sample(n, 1)), none(n))


def has_grad(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def backward(losses: Any) -> None:
    sum(value for value in losses.values() if value.requires_grad).backward()


@pytest.mark.parametrize("grid", [GRID, [1.0, 0.0]])
def test_from_noised_data_only_the_student_learns_and_in_one_pass(grid: list[float]) -> None:
    student, tapped, calls = net(1, 16, 2), net(2, 16, 2), []

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        calls.append(t)
        return student(x, t, cond)

    adversarial = critic(tapped, disc_input="noised-data", density=HIGH_NOISE)
    tapped.requires_grad_(False)
    adversarial.heads.requires_grad_(False)
    told = adversarial.generator_loss(Rollout(velocity, grid), batch(), draw(0, 0, 0))
    backward(told)
    assert has_grad(student) and not has_grad(tapped) and not has_grad(adversarial.heads)
    assert len(calls) == 1
    assert all(value.isfinite() for value in told.values())


@pytest.mark.parametrize("disc_input", ["finals", "last", "estimates", "noised-data"])
@pytest.mark.parametrize("through_backbone", [False, True])
def test_the_heads_loss_reaches_the_tapped_net_where_it_is_the_backbones(
    disc_input: Any, through_backbone: bool
) -> None:
    student, tapped = net(1, 16, 2), net(2, 16, 2)
    adversarial = critic(tapped, disc_input=disc_input)
    rollout = Rollout(student, GRID)
    loss = adversarial.backbone_loss if through_backbone else adversarial.discriminator_loss
    found = loss(rollout, batch(), draw(0, 0, 0))
    backward({"heads": found} if isinstance(found, torch.Tensor) else found)
    assert has_grad(adversarial.heads) and not has_grad(student)
    assert has_grad(tapped) == through_backbone


def test_the_loss_of_the_heads_is_the_same_for_the_backbone() -> None:
    adversarial, rollout = critic(net(2, 16, 2), disc_input="noised-data"), Rollout(net(1, 16, 2), GRID)
    heads = adversarial.discriminator_loss(rollout, batch(), draw(0, 0, 0))["heads"]
    assert torch.equal(heads, adversarial.backbone_loss(rollout, batch(), draw(0, 0, 0)))


@pytest.mark.parametrize(("trained", "times"), [((), GRID[:-1]), ((1, 2), GRID[1:3])])
def test_data_are_noised_to_the_times_where_trained_steps_start(
    trained: tuple[int, ...], times: list[float]
) -> None:
    seen: list[Any] = []

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        seen.append((x, t))
        return torch.zeros_like(x)

    data = Batch(torch.full((4000, 2), 10.0), none(4000))
    estimate_from_data(Rollout(velocity, GRID, trained), data, draw(0, 0, 0))
    [(x, t)] = seen
    assert sorted({round(float(time), 6) for time in t}) == pytest.approx(sorted(times))
    for time in times:
        rows = x[(t - time).abs() < 1e-6]
        assert len(rows) == pytest.approx(4000 / len(times), rel=0.15)
        assert float(rows.mean()) == pytest.approx(10 * (1 - time), abs=0.1)
        assert float(rows.std()) == pytest.approx(time, rel=0.1)


def test_heads_cannot_tell_a_student_that_restores_its_data() -> None:
    data = batch()

    def restores(x: Any, t: Any, cond: Any) -> Any:
        return (x - data.latents) / t[:, None]

    adversarial = critic(net(2, 16, 2), disc_input="noised-data", kind="hinge")
    told = adversarial.discriminator_loss(Rollout(restores, GRID), data, draw(0, 0, 0))
    assert float(told["heads/right"]) == pytest.approx(0.5, abs=0.02)
    assert (
        float(told["heads"].detach()) >= 2 - 1e-4
    )  # the least that the hinge loss allows where both look alike


def test_heads_learn_as_often_as_they_are_told_and_on_other_draws_each_time() -> None:
    student = net(1, 16, 2)
    method = LADD(student, student, critic(net(2, 16, 2), disc_input="noised-data"), GRID, heads_updates=3)
    updates = method.updates(0)
    assert [turn.net for turn in updates] == ["heads"] * 3 + ["student", "heads"]
    assert isinstance(updates[-1], InPlaceUpdate)
    told = [float(updates[i].losses(batch(), draw(0, 0, i))["heads"].detach()) for i in range(3)]  # type: ignore[union-attr]
    assert len(set(told)) == 3


def test_the_times_of_ladd_lean_to_noise() -> None:
    times = HIGH_NOISE(100_000, np.random.default_rng(0))
    logits = np.log(times / (1 - times))
    assert logits.mean() == pytest.approx(1, abs=0.02)
    assert logits.std() == pytest.approx(1, abs=0.02)


def test_one_step_has_no_spread_to_be_held_to() -> None:
    """A teacher's single step draws a mean, so that a good student's spread is several times its own."""
    for disc_input in ("finals", "noised-data"):
        adversarial = critic(net(2, 16, 2), disc_input=disc_input)
        for grid, watched in ((GRID, True), ([1.0, 0.0], False)):
            told = adversarial.generator_loss(Rollout(net(1, 16, 2), grid), batch(), draw(0, 0, 0))
            assert ("latent/std" in told) == watched
            assert "latent/mean" in told


def test_trajectory_guidance_adds_its_weighted_loss_to_the_students() -> None:
    student, data = net(1, 16, 2), walked(64)(64)(0, draw(0, 0, 0).share)
    adversarial = critic(net(2, 16, 2), disc_input="noised-data")
    told: list[Any] = []
    for weight in (0.0, 1.0, 3.0):
        [update] = [
            u for u in LADD(student, student, adversarial, GRID, 1, weight).updates(0) if u.net == "student"
        ]
        told.append(update.losses(data, draw(0, 0, 1)))  # type: ignore[union-attr]
    assert "trajectory" not in told[0]
    assert float(told[2]["trajectory"].detach()) == pytest.approx(3 * float(told[1]["trajectory"].detach()))
    assert told[1].keys() == told[0].keys() | {"trajectory"}
