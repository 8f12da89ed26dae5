from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fewstep.core import flow, sampling, schedule
from fewstep.core.types import Cond, UserError
from inverse_flow import to_velocity
from mixture import energy_distance, images, line, ring

EMPTY = Cond(np.zeros((3, 0, 0), np.float32), np.zeros((3, 0), np.float32))
SHAPE = (2, 4, 4)
KNOWN = [0.059911, 0.01556, -1.164438, -0.132647]


def test_a_seed_is_the_same_noise_in_every_batch() -> None:
    batch = sampling.batch_noise([5, 9, 2**64 - 1], SHAPE)
    assert batch.dtype == np.float32
    for row, seed in zip(batch, [5, 9, 2**64 - 1], strict=True):
        assert (row == sampling.noise(seed, SHAPE)).all()
    assert not np.isclose(batch[0], batch[1]).any()


def test_noise_of_a_seed_never_changes() -> None:
    # Numpy's Philox stream of key 0: pictures made with a seed must come back in a later version.
    assert sampling.noise(0, (4,)).tolist() == pytest.approx(KNOWN, abs=1e-6)


def test_noise_is_standard_normal_and_its_streams_are_independent() -> None:
    first, second = sampling.noise(3, (200, 200)), sampling.noise(3, (200, 200), stream=1)
    assert first.mean() == pytest.approx(0, abs=0.02)
    assert first.std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_one_clear_line(seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        sampling.noise(seed, SHAPE)


def straight(target: np.ndarray) -> Any:
    """The velocity whose every path ends in ``target``."""

    def velocity(x_t: Any, t: Any, cond: Cond) -> Any:
        return to_velocity(x_t, target, t)

    return velocity


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_euler_follows_a_straight_path_exactly(steps: int) -> None:
    target = sampling.batch_noise([7, 8, 9], SHAPE)
    x = sampling.batch_noise([1, 2, 3], SHAPE)
    out = sampling.sample_flow(straight(target), x, schedule.grid(steps), EMPTY)
    np.testing.assert_allclose(out, target, atol=1e-5)
    assert out.dtype == np.float32


def test_on_step_sees_the_clean_estimate() -> None:
    target = sampling.batch_noise([7, 8, 9], SHAPE)
    seen: list[tuple[int, float]] = []

    def look(index: int, t_next: float, x0: np.ndarray) -> None:
        seen.append((index, t_next))
        np.testing.assert_allclose(x0, target, atol=1e-5)

    sampling.sample_flow(
        straight(target),
        sampling.batch_noise([1, 2, 3], SHAPE),
        schedule.grid(4),
        EMPTY,
        hooks=sampling.Hooks(on_step=look),
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t in seen] == schedule.grid(4)[1:]


def test_a_grid_of_one_time_is_no_step() -> None:
    x = sampling.batch_noise([1, 2, 3], SHAPE)
    assert sampling.sample_flow(straight(x), x, schedule.strength_grid(4, 0.0), EMPTY) is x


@pytest.mark.parametrize("stochastic", [False, True])
def test_walks_do_not_depend_on_batching(stochastic: bool) -> None:
    teacher, seeds = images(), [11, 12, 13, 14]

    def run(seeds: list[int]) -> np.ndarray:
        step = sampling.renoise(seeds) if stochastic else sampling.euler
        x = sampling.batch_noise(seeds, SHAPE)
        return sampling.sample_flow(teacher, x, schedule.grid(4), teacher.cond(len(seeds)), step)

    together = run(seeds)
    for i, seed in enumerate(seeds):
        np.testing.assert_allclose(run([seed])[0], together[i], atol=1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_numpy_and_torch_walk_to_the_same_picture(stochastic: bool) -> None:
    import torch

    teacher, seeds = images(), [1, 2, 3, 4]
    x, cond = sampling.batch_noise(seeds, SHAPE), teacher.cond(4)
    steps = [sampling.renoise(seeds), sampling.renoise(seeds, torch.from_numpy)]
    if not stochastic:
        steps = [sampling.euler, sampling.euler]
    ours = sampling.sample_flow(teacher, x, schedule.grid(4), cond, steps[0])
    theirs = sampling.sample_flow(
        teacher, torch.from_numpy(x), schedule.grid(4), cond.map(torch.from_numpy), steps[1]
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_renoise_lands_on_the_noisy_marginal() -> None:
    target = np.zeros((64, *SHAPE), np.float32)
    seeds = list(range(64))
    step = sampling.renoise(seeds)
    x = sampling.batch_noise(seeds, SHAPE)
    out = step(x, to_velocity(x, target, 1.0), 1.0, 0.5, 0)
    assert out.std() == pytest.approx(0.5, abs=0.02)  # (1 - t) 0 + t eps at t = 0.5
    assert np.corrcoef(out.ravel(), x.ravel())[0, 1] == pytest.approx(0, abs=0.06)
    last = step(out, to_velocity(out, target, 0.5), 0.5, 0.0, 1)
    np.testing.assert_allclose(last, target, atol=1e-6)


@pytest.mark.parametrize(("teacher", "shape"), [(line(), (1,)), (ring(), (2,)), (images(), SHAPE)])
def test_many_steps_sample_the_mixture_and_four_do_not(teacher: Any, shape: tuple[int, ...]) -> None:
    n = 1500
    x, cond = sampling.batch_noise(range(n), shape), teacher.cond(n)
    truth = teacher.sample(n, seed=1)
    many, few, one = (
        energy_distance(sampling.sample_flow(teacher, x, schedule.grid(steps), cond), truth)
        for steps in (64, 4, 1)
    )
    floor = abs(energy_distance(teacher.sample(n, seed=2), truth))
    assert many < max(3 * floor, 0.01)
    assert many < few < one


def test_renoising_samples_the_mixture_too() -> None:
    teacher, n = ring(), 1500
    x, truth = sampling.batch_noise(range(n), (2,)), teacher.sample(n, seed=1)
    # Where the estimate of x_0 is a blurred mean, renoising is not exact; it is far better than one step.
    walked = sampling.sample_flow(teacher, x, schedule.grid(16), teacher.cond(n), sampling.renoise(range(n)))
    once = sampling.sample_flow(teacher, x, schedule.grid(1), teacher.cond(n))
    assert energy_distance(walked, truth) < energy_distance(once, truth) / 4


def test_image_to_image_stays_near_a_weak_strength() -> None:
    teacher, n = images(), 64
    start, cond = teacher.sample(n, seed=3), teacher.cond(n)
    noise = sampling.batch_noise(range(n), SHAPE)
    moved = []
    for strength in (0.1, 0.5, 1.0):
        grid = schedule.strength_grid(8, strength)
        out = sampling.sample_flow(teacher, flow.interpolate(start, noise, grid[0]), grid, cond)
        moved.append(float(np.square(out - start).mean()))
    assert all(a < b for a, b in pairwise(moved))
