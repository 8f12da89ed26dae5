"""Methods on the closed-form mixture, where the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.core import sampling, schedule
from fewstep.core.types import Batch, Cond, Model
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.read import TeacherSamples
from fewstep.data.teacher_samples.write import write_samples
from fewstep.methods.base import Method
from fewstep.methods.flow_matching import FlowMatching
from fewstep.methods.trajectory import Trajectory
from fewstep.pocket import config as pocket
from fewstep.pocket.vae_loss import AutoencoderTraining
from fewstep.train.train_step import draw
from mixture import energy_distance, ring
from points import GRID, net, none

pytestmark = pytest.mark.slow(15)


def learn(method: Method, batches: Callable[[int], Any], steps: int, lr: float) -> float:
    """Adam with a rate that falls to zero; the last loss."""
    [name] = method.nets
    optimizer = torch.optim.Adam(method.nets[name].parameters(), lr)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        [turn] = method.updates(step)
        loss = sum(turn.losses(batches(step), draw(0, step, 0)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("density", [schedule.logit_normal, schedule.shifted(schedule.logit_normal, 2.0)])
def test_flow_matching_is_least_at_the_true_velocity(density: schedule.Density) -> None:
    truth = ring()
    batch = Batch(torch.from_numpy(truth.sample(20_000, 1)), none(20_000))

    def loss(velocity: Any) -> float:
        return float(
            FlowMatching(torch.nn.Identity(), velocity, density).losses(batch, draw(0, 0, 0))["flow"]
        )

    least = loss(truth)
    directions: list[Callable[[Any, Any], Any]] = [
        lambda x, t: x,
        lambda x, t: t[:, None] * x.flip(1),
        lambda x, t: torch.sin(3 * x),
        lambda x, t: torch.ones_like(x),
    ]
    for direction in directions:
        for size in (-0.1, 0.1):
            away = loss(lambda x, t, c, d=direction, s=size: truth(x, t, c) + s * d(x, t))
            # At the minimum a move by d costs its own square and nothing in proportion to its size.
            assert away > least + 0.3 * size**2 * loss_of_size(direction, batch, density)


def loss_of_size(direction: Callable[[Any, Any], Any], batch: Batch, density: schedule.Density) -> float:
    """Mean square of ``direction`` at the points where the loss looks."""
    kept: list[float] = []

    def look(x: Any, t: Any, cond: Cond) -> Any:
        kept.append(float(direction(x, t).square().mean()))
        return x

    FlowMatching(torch.nn.Identity(), look, density).losses(batch, draw(0, 0, 0))
    return kept[0]


def test_a_net_that_flow_matches_draws_the_ring() -> None:
    truth, student = ring(), net()

    def batches(step: int) -> Batch:
        return Batch(torch.from_numpy(truth.sample(512, step)), none(512))

    learn(FlowMatching(student, student, schedule.uniform), batches, 600, 3e-3)
    apart = distance(student, 32)
    assert apart < 0.02
    assert apart < 0.1 * energy_distance(sampling.batch_noise(range(4000), (2,)), truth.sample(4000, 99))


def teacher() -> Model:
    """The mixture as a model of shape [2], for whoever walks it."""
    return Model(
        name="ring",
        velocity=ring(),
        text=lambda prompts: none(len(prompts)),
        codec=None,  # type: ignore[arg-type]  # points have no pixels
        latent=(2,),  # type: ignore[arg-type]
        downscale=1,
        shift=3.0,
        steps=64,
        from_numpy=torch.from_numpy,
        to_numpy=lambda x: x.numpy(),
    )


def walks_of(model: Model, many: int, steps: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """States ``[N, 5, 2]`` of the model's walks, and their times."""
    plan = manifest.make(model, [""] * many, guidance=None, steps=steps, student_steps=4, per_shard=4096)
    write_samples(model, [""] * many, plan, folder, batch=4096)
    made = TeacherSamples.open(folder)
    return made.read(range(many)).trajectory, torch.tensor(made.times)


def distance(velocity: Any, steps: int, n: int = 4000) -> float:
    """Energy distance of ``steps`` Euler steps to the truth."""
    start = torch.from_numpy(sampling.batch_noise(range(10_000, 10_000 + n), (2,)))
    with torch.no_grad():
        ends = sampling.sample_flow(velocity, start, schedule.grid(steps), none(n))
    return energy_distance(ends.numpy(), ring().sample(n, 99))


def test_a_student_of_four_steps_is_far_better_than_its_teachers_four(tmp_path: Any) -> None:
    states, grid = walks_of(teacher(), 8192, 32, tmp_path)
    assert grid.tolist() == pytest.approx(GRID)
    student = net()

    def batches(step: int) -> Batch:
        rows = torch.from_numpy(np.random.default_rng(step).integers(0, len(states), 512))
        return Batch(states[rows, -1], none(512), (), states[rows])

    learn(Trajectory(student, student, GRID), batches, 1500, 4e-3)
    teachers, students = distance(ring(), 4), distance(student, 4)
    assert 0.05 < teachers < 0.12  # 0.086 in a larger sample
    assert students < 0.01
    assert students < 0.15 * teachers


def test_the_trajectory_loss_is_nought_for_the_teachers_own_moves() -> None:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    states = [x]
    for t, t_next in pairwise(GRID):
        states.append(sampling.sample_flow(ring(), states[-1], [t, t_next], none(64)))
    batch = Batch(states[-1], none(64), (), torch.stack(states, 1))
    told = Trajectory(torch.nn.Identity(), ring(), GRID).losses(batch, draw(0, 0, 0))
    assert float(told["trajectory"]) < 1e-10


def test_trajectory_guidance_needs_walks_at_its_times() -> None:
    states = torch.zeros(4, 3, 2)
    for batch in (Batch(states[:, -1], none(4)), Batch(states[:, -1], none(4), (), states)):
        with pytest.raises(ValueError, match="trajectories at 5 times"):
            Trajectory(net(), net(), GRID).losses(batch, draw(0, 0, 0))


def test_the_codecs_losses_are_nought_for_a_perfect_copy_but_for_the_divergence() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Copy(torch.nn.Module):
        """Encodes to the picture itself, with no spread to speak of."""

        def encode(self, x: Any) -> Any:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            posterior = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -30)], 1))
            return type("Encoded", (), {"latent_dist": posterior})

        def decode(self, z: Any) -> Any:
            return type("Decoded", (), {"sample": z})

    told = AutoencoderTraining(Copy(), divergence=1.0).losses(images, draw(0, 0, 0))
    assert all(float(told[name]) < 1e-5 for name in ("absolute", "square", "edges", "colour"))
    expected = 0.5 * (images.square() + np.exp(-30) - 1 + 30).mean()
    assert float(told["divergence"]) == pytest.approx(float(expected), rel=1e-4)


def test_a_shift_of_colour_costs_where_edges_are_blind() -> None:
    class Off(torch.nn.Module):
        def encode(self, x: Any) -> Any:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            posterior = DiagonalGaussianDistribution(torch.cat([x, torch.full_like(x, -30)], 1))
            return type("Encoded", (), {"latent_dist": posterior})

        def decode(self, z: Any) -> Any:
            return type("Decoded", (), {"sample": z + 0.5})

    told = AutoencoderTraining(Off()).losses(torch.zeros(1, 3, 16, 16), draw(0, 0, 0))
    assert float(told["edges"]) < 1e-5
    assert float(told["colour"]) == pytest.approx(2.0 * (0.5 + 2 * 0.25), rel=1e-4)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_the_decoder_alone_has_gradients_when_the_encoder_shall_stay(decoder_only: bool) -> None:
    vae = pocket.autoencoder()
    images = torch.zeros(1, 3, 16, 16)
    told = AutoencoderTraining(vae, decoder_only).losses(images, draw(0, 0, 0))
    sum(value for value in told.values() if value.requires_grad).backward()
    assert all(p.grad is not None for p in vae.decoder.parameters())
    assert all((p.grad is None) == decoder_only for p in vae.encoder.parameters())
