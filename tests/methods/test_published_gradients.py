"""The losses' gradients against the formulas of the papers, which are written out here once more.

No formula here calls the project's losses or its arithmetic of the flow. Scores of the teacher come from the
closed-form density of the ring. A gradient of a net's parameters is a product of a vector with its Jacobian,
as the papers write it: ``E[weight dG/dtheta]``. All is float64 but for LADD, whose heads are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.core.guidance import Guided
from fewstep.core.types import Batch, Cond
from fewstep.methods.base import StepRandom
from fewstep.methods.dmd import DistributionMatching
from fewstep.methods.ladd import AdversarialLoss
from fewstep.methods.lcm import LCM, Target, consistency_distance
from fewstep.methods.rollout import Rollout
from fewstep.methods.tdm import TDM, forward_diffuse
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps
from fewstep.train.train_step import draw
from mixture import ring
from points import GRID, net, none

N, D = 8, 2
SCALE = 3.0
TINY = 1e-6  # what we add to the normaliser, and the papers do not: seen where t is small
EQUAL = 1e-6
SINGLE = 2e-5  # in float32
T_MIN, T_MAX = 0.02, 0.98  # DMD, section 3.2
APART = 1e-2  # a factor that is wrong shows at least so much


class Steps(np.random.Generator):
    """Draws one step of the grid for a whole batch, always the same; all else at random."""

    step = 0

    def integers(self, low: Any, high: Any = None, size: Any = None, *rest: Any, **options: Any) -> Any:
        return self.step if size is None else super().integers(low, high, size, *rest, **options)


@dataclass(frozen=True)
class Recorded(StepRandom):
    """Random numbers that the test can read afterwards, in the order in which they were drawn."""

    noises: list[Any] = field(default_factory=list)
    drawn_times: list[Any] = field(default_factory=list)
    drawn_choices: list[Any] = field(default_factory=list)
    double: bool = True

    def noise(self, like: Any) -> Any:
        noise = super().noise(like)
        self.noises.append(noise.double() if self.double else noise)
        return self.noises[-1]

    def times(self, density: Any, like: Any) -> Any:
        times = super().times(density, like)
        self.drawn_times.append(times.double() if self.double else times)
        return self.drawn_times[-1]

    def choices(self, options: Sequence[int], like: Any) -> Any:
        self.drawn_choices.append(super().choices(options, like))
        return self.drawn_choices[-1]


def recorded(step: int = 0, seed: int = 0, double: bool = True) -> Recorded:
    plain = draw(seed, 0, 0)
    rng = Steps(plain.rng.bit_generator)
    rng.step = step
    return Recorded(rng, plain.torch, double=double)


def small(seed: int) -> Any:
    return net(seed, 16, 2).double()


def batch() -> Batch:
    """Points of the ring, each with a condition of its own."""
    latents = torch.from_numpy(ring().sample(N, 3)).double()
    logits = 2 * torch.randn(N, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Batch(latents, Cond(none(N).context, logits))


def guided() -> Guided:
    return Guided(ring(), none(1), SCALE)


def column(t: float | torch.Tensor) -> Any:
    return t[:, None] if isinstance(t, torch.Tensor) else t


def rows(t: float) -> Any:
    return torch.full((N,), t)


def score_of_velocity(x_t: Any, v: Any, t: Any) -> Any:
    """``s = -eps / sigma`` with ``eps = x_t + (1 - t) v`` and ``sigma = t``."""
    return -(x_t + (1 - column(t)) * v) / column(t)


def mean_of_score(x_t: Any, s: Any, t: Any) -> Any:
    """DMD's equation 4, solved for ``mu``: ``s = -(x_t - alpha mu) / sigma^2``."""
    return (x_t + column(t) ** 2 * s) / (1 - column(t))


def real_score(x_t: Any, t: Any, cond: Cond, scale: float = SCALE) -> Any:
    """The guided score, ``s_u + scale (s_c - s_u)``, from the density of the ring."""
    with_cond, without = ring().score(x_t, t, cond), ring().score(x_t, t, none(N))
    return without + scale * (with_cond - without)


def states(student: Any, noise: Any, cond: Cond) -> list[Any]:
    """The student's trajectory by Euler's method."""
    walked = [noise]
    with torch.no_grad():
        for t, t_next in pairwise(GRID):
            walked.append(walked[-1] + (t_next - t) * student(walked[-1], rows(t), cond))
    return walked


def estimate(student: Any, x: Any, t: float | torch.Tensor, cond: Cond) -> Any:
    """``G``: the student's clean estimate at ``x``."""
    times = t if isinstance(t, torch.Tensor) else rows(t)
    return x - column(t) * student(x, times, cond)


def jacobian(output: Any, part: Any, weight: Any) -> Any:
    """``mean over the batch of weight d output / d theta``, the mean also over a sample's values."""
    grads = torch.autograd.grad(output, list(part.parameters()), weight.detach() / output.numel(), True)
    return torch.cat([g.flatten() for g in grads])


def gradient(loss: Any, part: Any) -> Any:
    grads = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def apart(ours: Any, published: Any) -> float:
    """Largest difference in terms of the largest value."""
    return float(((ours - published).abs().max() / published.abs().max()).detach())


def normaliser(mean: Any, x: Any) -> Any:
    """``C S / |mu_base(x_t, t) - x|_1`` of DMD's equation 8, for every sample."""
    return D / ((mean - x).abs().sum(1, keepdim=True) + D * TINY)


@dataclass
class Renoised:
    """What the formulas of DMD are made of, at one step of a student: the loss renoises its estimate."""

    ours: Any
    x: Any
    t: Any
    fake: Any
    real: Any
    student: Any

    @property
    def size(self) -> Any:
        return normaliser(mean_of_score(self.x_t, self.real, self.t), self.x.detach())

    x_t: Any = None


def renoised(step: int, scale: float = SCALE) -> Renoised:
    student, proxy, random, points = small(1), small(2), recorded(step), batch()
    teacher = Guided(ring(), none(1), scale)
    matching = DistributionMatching(teacher, proxy, "renoise")
    loss = matching.student_loss(Rollout(student, GRID), points, random)["matching"]
    start, fresh = random.noises
    x = estimate(student, states(student, start, points.cond)[step], GRID[step], points.cond)
    t = random.drawn_times[0].clamp(T_MIN, T_MAX)
    x_t = (1 - column(t)) * x.detach() + column(t) * fresh
    with torch.no_grad():
        fake = score_of_velocity(x_t, proxy(x_t, t, points.cond), t)
    real = real_score(x_t, t, points.cond, scale)
    return Renoised(gradient(loss, student), x, t, fake, real, student, x_t)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_matching_is_the_difference_of_the_scores(step: int, scale: float) -> None:
    """DMD (arXiv 2311.18828), equation 7, ``E[w alpha (s_fake - s_real) dG/dtheta]``, with the weight that
    its Algorithm 2 takes, ``w = sigma^2 / alpha^2  C S / |mu - x|_1``; DMD2 (arXiv 2405.14867), equation 3
    and section 4.5, takes ``G`` at every step of the student. The guided teacher: section 3.4 of DMD."""
    a = renoised(step, scale)
    alpha, sigma = 1 - column(a.t), column(a.t)
    w = sigma**2 / alpha**2 * a.size
    assert apart(a.ours, jacobian(a.x, a.student, w * alpha * (a.fake - a.real))) < EQUAL


def test_matching_is_algorithm_2_of_dmd() -> None:
    """DMD (arXiv 2311.18828), appendix, Algorithm 2, ``loss = 0.5 mse(x, stopgrad(x - grad))`` with ``grad =
    (pred_fake - pred_real) / mean |x - pred_real|``."""
    a = renoised(2)
    fake, real = (mean_of_score(a.x_t, s, a.t) for s in (a.fake, a.real))
    grad = (fake - real) / (a.x.detach() - real).abs().mean(1, keepdim=True)
    loss = 0.5 * torch.nn.functional.mse_loss(a.x, (a.x - grad).detach())
    assert apart(a.ours, gradient(loss, a.student)) < 1e-4  # to the letter, so without what we add


def test_equation_8_of_dmd_as_printed_has_one_more_alpha() -> None:
    """DMD (arXiv 2311.18828), equation 8 against Algorithm 2, which says that it "diverges slightly" from the
    equation. ``w = sigma^2 / alpha  C S / |mu - x|_1`` weighs a sample ``alpha_t`` times as much as we do.
    They are the same where ``alpha = 1``, as in EDM."""
    a = renoised(2)
    alpha, sigma = 1 - column(a.t), column(a.t)
    printed = sigma**2 / alpha * a.size * alpha * (a.fake - a.real)
    assert apart(a.ours, jacobian(a.x, a.student, printed)) > APART
    assert apart(a.ours, jacobian(a.x, a.student, printed / alpha)) < EQUAL


def test_a_wrong_factor_of_matching_shows() -> None:
    """No normaliser, another norm, no guidance, the sign, a missing ``sigma^2``: none is the gradient of DMD
    (arXiv 2311.18828, equations 7 and 8)."""
    a = renoised(1)
    alpha, sigma = 1 - column(a.t), column(a.t)
    right = sigma**2 / alpha * (a.fake - a.real) * a.size
    assert apart(a.ours, jacobian(a.x, a.student, right)) < EQUAL
    plain = renoised(1, 1.0)
    wrong = {
        "no normaliser": right / a.size,
        "normaliser of the batch": right / a.size * a.size.mean(),
        "no mean of the normaliser": right / D,
        "no guidance": sigma**2 / alpha * (plain.fake - plain.real) * a.size,
        "sign": -right,
        "no sigma": right / sigma**2,
    }
    shown = {name: apart(a.ours, jacobian(a.x, a.student, weight)) for name, weight in wrong.items()}
    assert min(shown.values()) > APART, shown


class Kept:
    """A velocity that keeps what it said."""

    def __init__(self, student: Any) -> None:
        self.student, self.v = student, torch.zeros(0)

    def __call__(self, x_t: Any, t: Any, cond: Cond) -> Any:
        v = self.student(x_t, t, cond)
        if v.requires_grad and torch.is_grad_enabled():
            self.v = v
        return v


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("where", ["shared", "shared-free"])
def test_what_the_gradient_moves_sets_the_weight_of_a_step(where: Any, step: int) -> None:
    """DMD (arXiv 2311.18828), equation 7, in terms of the velocity ``v`` of step ``i``: ``dG/dv`` is
    ``t - t_i`` for the point ``G = x + (t - t_i) v``, and ``-t_i`` for the estimate ``G = x - t_i v``. The
    scores are the same, compared on the trajectory as in SD3.5-Flash (arXiv 2509.21318, timestep sharing)."""
    found, weights, points = {}, {}, batch()
    for on in ("state", "x0", "velocity"):
        student, proxy, random = small(1), small(2), recorded(step)
        matching = DistributionMatching(guided(), proxy, where, gradient_on=on)
        kept = Kept(student)
        loss = matching.student_loss(Rollout(kept, GRID), points, random)["matching"]
        found[on] = torch.autograd.grad(loss, kept.v)[0]

        x, t_i = states(student, random.noises[0], points.cond)[step], GRID[step]
        end = GRID[step + 1] or t_i / 2
        t = rows(end).double()
        if where == "shared-free":
            t = GRID[step + 1] + (t_i - GRID[step + 1]) * random.drawn_times[0].clamp(T_MIN, T_MAX)
        with torch.no_grad():
            v = student(x, rows(t_i), points.cond)
            x_t = x + (column(t) - t_i) * v
            fake = score_of_velocity(x_t, proxy(x_t, t, points.cond), t)
        real = real_score(x_t, t, points.cond)
        size = normaliser(mean_of_score(x_t, real, t), x - t_i * v)
        weights = {"state": column(t) - t_i, "x0": -t_i, "velocity": -1.0}
        g = column(t) ** 2 / (1 - column(t)) * (fake - real) * size / (N * D)
        assert apart(found[on], weights[on] * g) < EQUAL
        for other in weights.keys() - {on}:
            if t_i < 1 or "state" in (on, other):  # at t = 1 the estimate and the velocity weigh alike
                assert apart(found[on], weights[other] * g) > APART
    assert apart(found["x0"], GRID[step] * found["velocity"]) < 1e-12


@pytest.mark.parametrize("step", range(4))
def test_a_renoised_gradient_on_the_velocity_is_that_on_the_estimate_over_t(step: int) -> None:
    """DMD2 (arXiv 2405.14867), equation 3: ``dG/dtheta = -t_i dv/dtheta``."""
    found, points = {}, batch()
    for on in ("x0", "velocity"):
        student, proxy, random = small(1), small(2), recorded(step)
        matching = DistributionMatching(guided(), proxy, "renoise", gradient_on=on)
        found[on] = gradient(
            matching.student_loss(Rollout(student, GRID), points, random)["matching"], student
        )
    assert apart(found["x0"], GRID[step] * found["velocity"]) < 1e-12


def test_noise_is_added_as_by_the_forward_process() -> None:
    """TDM (arXiv 2503.06674), section 4: ``q(x_tau | x_{t_i})`` is the forward process from ``t_i`` on, so
    ``a = alpha_tau / alpha_{t_i}`` and ``b^2 = sigma_tau^2 - a^2 sigma_{t_i}^2``; the denoising target is
    ``grad log q = -eps / b``."""
    x, noise = torch.randn(2, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.55, 0.95, N, dtype=torch.float64)

    def factors(t_from: float) -> tuple[Any, Any]:
        ones, zeros = torch.ones_like(x), torch.zeros_like(x)
        return forward_diffuse(ones, zeros, t_from, t)[0], forward_diffuse(zeros, ones, t_from, t)[0]

    for t_from in (0.0, 0.25, 0.5):
        a, b = factors(t_from)
        assert apart(a, ((1 - t) / (1 - t_from))[:, None].expand(N, D)) < 1e-12
        assert apart(a**2 * t_from**2 + b**2, column(t**2).expand(N, D)) < 1e-12
        x_t, v = forward_diffuse(x, noise, t_from, t)
        assert apart(x_t, a * x + b * noise) < 1e-12
        assert apart(score_of_velocity(x_t, v, t), -noise / b) < 1e-9
    # Two steps of the process are one.
    (a_1, b_1), (a_0, b_0) = factors(0.5), factors(0.0)
    assert apart(a_1 * 0.5, a_0) < 1e-12 and apart((a_1 * 0.5) ** 2 + b_1**2, b_0**2) < 1e-12


def tdm_updates(step: int, **options: Any) -> tuple[Any, Any, Any, Any, Batch]:
    student, proxy = small(1), small(2)
    method = TDM(student, student, proxy, proxy, guided(), GRID, 1, **options)
    proxy_update, student_update = method.updates(0)
    return proxy_update, student_update, student, proxy, batch()


def diffused(step: int, student: Any, random: Recorded, points: Batch) -> tuple[Any, Any, Any, Any]:
    """``x_tau`` from the end of a step, its time, and ``a`` and ``b`` of the forward process."""
    start, fresh = random.noises
    end, t_end = states(student, start, points.cond)[step + 1], GRID[step + 1]
    t = t_end + (min(GRID[step], T_MAX) - t_end) * random.drawn_times[0].clamp(T_MIN, T_MAX)
    a = column((1 - t) / (1 - t_end))
    b = (column(t) ** 2 - a**2 * t_end**2).sqrt()
    return a * end + b * fresh, t, a, b


@pytest.mark.parametrize("step", range(4))
def test_the_proxy_of_tdm_predicts_the_noise(step: int) -> None:
    """TDM (arXiv 2503.06674), equation 7, the fake score's denoising: ``sigma^2 |s_psi(x_tau) - grad log
    q(x_tau | x_{t_i})|^2``, which is ``|eps_psi - tau eps / b|^2``. Its weights of importance sampling are
    not ours."""
    proxy_update, _, student, proxy, points = tdm_updates(step)
    random = recorded(step)
    loss = proxy_update.losses(points, random)["proxy"]
    x_t, t, _, b = diffused(step, student, random, points)
    tau, fresh = column(t), random.noises[1]
    noise = x_t + (1 - tau) * proxy(x_t, t, points.cond)
    error = noise - tau * fresh / b
    assert apart(loss, (error * error).mean()) < EQUAL
    assert apart(gradient(loss, proxy), jacobian(noise, proxy, 2 * error)) < EQUAL
    # The same in terms of scores.
    score = -noise / tau
    scored = (tau**2 * (score + fresh / b) ** 2).mean()
    assert apart(gradient(loss, proxy), gradient(scored, proxy)) < EQUAL
    if GRID[step + 1]:  # at the last step b = tau, so this noise is that noise
        plain = (x_t + (1 - tau) * proxy(x_t, t, points.cond) - fresh).square().mean()
        assert apart(gradient(loss, proxy), gradient(plain, proxy)) > APART
    unweighted = ((noise - tau * fresh / b) / (1 - tau)).square().mean()
    assert apart(gradient(loss, proxy), gradient(unweighted, proxy)) > APART


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("on", ["x0", "state"])
def test_tdm_matches_the_scores_in_each_steps_own_interval(on: Any, step: int) -> None:
    """TDM (arXiv 2503.06674), equations 5 and 6: ``lambda_tau (s_psi - s_phi)(x_tau) d x_{t_i} / d theta``
    (``state``); the authors' code takes the clean estimate instead (``x0``, our default). ``lambda`` is that
    of DMD's Algorithm 2: ``sigma^2 / alpha  C S / |mu - x|_1`` in terms of scores."""
    _, student_update, student, proxy, points = tdm_updates(step, gradient_on=on)
    random = recorded(step)
    ours = gradient(student_update.losses(points, random)["matching"], student)
    x_t, t, *_ = diffused(step, student, random, points)
    with torch.no_grad():
        fake = score_of_velocity(x_t, proxy(x_t, t, points.cond), t)
    real = real_score(x_t, t, points.cond)
    x, t_i, t_end = states(student, random.noises[0], points.cond)[step], GRID[step], GRID[step + 1]
    x0 = estimate(student, x, t_i, points.cond)
    end = x + (t_end - t_i) * student(x, rows(t_i), points.cond)
    weight = column(t) ** 2 / (1 - column(t)) * normaliser(mean_of_score(x_t, real, t), x0.detach())
    published = jacobian(x0 if on == "x0" else end, student, weight * (fake - real))
    assert apart(ours, published) < EQUAL
    other = jacobian(end if on == "x0" else x0, student, weight * (fake - real))
    if t_end:  # the last step ends at its estimate
        assert apart(ours, other) > APART


def huber(error: Any) -> tuple[Any, Any]:
    """``sqrt(|e|^2 + c^2) - c`` of every sample, and its gradient ``e / sqrt(|e|^2 + c^2)``."""
    c = 0.00054 * error[0].numel() ** 0.5
    root = (error.flatten(1).square().sum(1) + c**2).sqrt()
    return root - c, error / root.reshape(-1, *[1] * (error.ndim - 1))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_pseudo_huber_is_that_of_ict(size: float) -> None:
    """iCT (Song and Dhariwal, arXiv 2310.14189), section 3.3: ``d(x, y) = sqrt(|x - y|^2 + c^2) - c`` with
    ``c = 0.00054 sqrt(d)``. Ours is over ``sqrt(d)``, a constant of the learning rate."""
    generator = torch.Generator().manual_seed(0)
    error = (size * torch.randn(N, 3, 4, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    value, grad = huber(error.detach())
    loss = consistency_distance(error, "pseudo-huber")
    (ours,) = torch.autograd.grad(loss, error)
    assert abs(float(loss.detach() - value.mean() / 48**0.5)) < 1e-12 * size + 1e-15
    assert apart(ours, grad / 48**0.5 / N) < 1e-10
    if size < 1e-3:  # here c counts
        lengths = error.detach().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        assert apart(ours, error.detach() / lengths / 48**0.5 / N) > APART


def lcm_parts(target: Any = None) -> tuple[Any, Any, Any, Recorded]:
    """The loss of LCM, and the student's estimate and its target, written out."""
    student, points, random = small(1), batch(), recorded()
    grid = [T_MAX * (1 - i / 16) for i in range(17)]
    aim = None if target is None else Target(target, target)
    method = LCM(student, student, guided(), grid, aim)
    loss = method.losses(points, random)["consistency"]
    index = random.drawn_choices[0]
    t, t_next = (torch.tensor(times)[index].double() for times in (grid[:-1], grid[1:]))
    x = (1 - column(t)) * points.latents + column(t) * random.noises[0]
    # The guided score as a velocity: v = eps - x_0 with eps = -t s and x_0 = (x + t^2 s) / (1 - t).
    teacher = -(column(t) * real_score(x, t, points.cond) + x) / (1 - column(t))
    x_next = x + column(t_next - t) * teacher
    aim = estimate(target or student, x_next, t_next, points.cond)
    return loss, estimate(student, x, t, points.cond), aim, student


@pytest.mark.parametrize("with_target", [False, True])
def test_consistency_is_pseudo_huber_to_the_estimate_after_a_step_of_the_teacher(with_target: bool) -> None:
    """Consistency distillation (arXiv 2303.01469, equation 7; the guided solver: LCM, arXiv 2310.04378,
    section 4) with the metric of iCT (arXiv 2310.14189, section 3.3). The weight ``lambda(t)`` is 1."""
    loss, online, aim, student = lcm_parts(small(5) if with_target else None)
    value, grad = huber((online - aim).detach())
    ours = gradient(loss, student)
    assert apart(loss, value.mean() / D**0.5) < EQUAL
    # `jacobian` is a mean over N D values, the loss one over N samples and sqrt(D).
    assert apart(ours, jacobian(online, student, grad * D / D**0.5)) < EQUAL
    squares = jacobian(online, student, 2 * (online - aim))
    assert apart(ours, squares) > APART


def test_a_gradient_through_the_target_of_consistency_would_show() -> None:
    """iCT (arXiv 2310.14189), section 3.2: the target is the student itself under a stop-gradient."""
    loss, online, aim, student = lcm_parts()
    ours = gradient(loss, student)
    through, _ = huber(online - aim)
    stopped, _ = huber(online - aim.detach())
    assert apart(ours, gradient(stopped.mean() / D**0.5, student)) < EQUAL
    assert apart(ours, gradient(through.mean() / D**0.5, student)) > APART


@dataclass
class Judged:
    """LADD on noised data, written out: a tapped net, fixed heads, the loss, and its random numbers."""

    adversarial: AdversarialLoss
    tapped: Any
    heads: Any
    student: Any
    points: Batch
    random: Recorded

    def point(self, x: Any) -> Any:
        """``x`` noised to the drawn times."""
        return self.noised(x, self.random.noises[1], self.random.drawn_times[0])

    def logits(self, x_t: Any) -> Any:
        """The heads' opinions of a noised point."""
        hidden, t = x_t, self.random.drawn_times[0]
        waves = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        hidden, opinions = torch.cat([hidden, waves.sin(), waves.cos()], 1), []
        heads = iter(self.heads.heads)
        for layer in self.tapped.layers[:-1]:
            hidden = layer(hidden)
            if isinstance(layer, torch.nn.ReLU):
                opinions.append(next(heads)(hidden[:, None]))
        return torch.cat(opinions, 1)

    @staticmethod
    def noised(x: Any, noise: Any, t: Any) -> Any:
        return (1 - t[:, None]) * x + t[:, None] * noise

    def fake(self) -> Any:
        """The student's clean estimates of data that is noised to times of its grid."""
        s = torch.tensor(GRID)[self.random.drawn_choices[0]]
        return estimate(
            self.student, self.noised(self.points.latents, self.random.noises[0], s), s, self.points.cond
        )


def judged(**options: Any) -> Judged:
    tapped, student = net(4, 16, 2), net(1, 16, 2)
    heads = DiscriminatorHeads([16, 16])
    with torch.no_grad():
        for head in heads.heads:
            head[-2].weight *= 4  # so that some logits lie beyond the margin
    points = Batch(torch.from_numpy(ring().sample(N, 3)), none(N))
    adversarial = AdversarialLoss(
        FeatureTaps(tapped, tapped.blocks), heads, "noised-data", kind="hinge", **options
    )
    return Judged(adversarial, tapped, heads, student, points, recorded(double=False))


def test_the_heads_learn_by_the_hinge() -> None:
    """LADD (arXiv 2403.12015), section 3, with ADD's hinge (arXiv 2311.17042, equations 2 and 3; Lim and Ye,
    arXiv 1705.02894): ``E[max(0, 1 - D(x_t))] + E[max(0, 1 + D(x̂_t))]``. Its gradient by the logits is ``-1``
    for the real ones below 1 and ``1`` for the fake ones above -1. The term ``smooth`` is ours besides."""
    a = judged()
    told = a.adversarial.discriminator_loss(Rollout(a.student, GRID), a.points, a.random)
    real, fake = (a.logits(a.point(x)) for x in (a.points.latents, a.fake().detach()))
    loss = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert apart(told["heads"], loss) < SINGLE
    active = real < 1, fake > -1
    assert all(0 < float(part.float().mean()) < 1 for part in active)  # the hinge is seen on both sides
    by_hand = jacobian(real, a.heads, -active[0].float()) + jacobian(fake, a.heads, active[1].float())
    ours = gradient(told["heads"], a.heads)
    assert apart(ours, by_hand) < SINGLE
    straight = jacobian(real, a.heads, -torch.ones_like(real)) + jacobian(
        fake, a.heads, torch.ones_like(fake)
    )
    assert apart(ours, straight) > APART
    # The extra term: it is its own loss, and off at weight 0.
    assert float(told["smooth"].detach()) > 0
    off = judged(smooth=0.0)
    plain = off.adversarial.discriminator_loss(Rollout(off.student, GRID), off.points, off.random)
    assert float(plain["smooth"].detach()) == 0
    assert apart(gradient(plain["heads"] + plain["smooth"], off.heads), by_hand) < SINGLE
    assert apart(gradient(told["heads"] + told["smooth"], a.heads), by_hand) > 1e-3


def test_the_student_of_ladd_raises_the_heads_opinion_of_its_estimate() -> None:
    """LADD (arXiv 2403.12015), section 3: ``-E[D((1 - t) x̂_0 + t eps)]`` with ``x̂_0`` the student's estimate
    of noised data, so ``-(1 - t) dD/dx_t  dx̂_0/dtheta``, without a hinge (Lim and Ye, arXiv 1705.02894)."""
    a = judged(weight=0.5)
    loss = a.adversarial.generator_loss(Rollout(a.student, GRID), a.points, a.random)["adversarial"]
    x0, t = a.fake(), column(a.random.drawn_times[0])
    x_t = a.point(x0).detach().requires_grad_()
    logits = a.logits(x_t)
    # Of the mean over logits. `jacobian` is a mean over the values of `x0`, so these are taken out.
    by_point = torch.autograd.grad(logits.mean(), x_t)[0] * x0.numel()
    published = jacobian(x0, a.student, -(1 - t) * by_point)
    ours = gradient(loss, a.student)
    assert apart(loss, -0.5 * logits.mean()) < SINGLE
    assert apart(ours, 0.5 * published) < SINGLE
    assert apart(ours, 0.5 * jacobian(x0, a.student, -by_point)) > APART
    assert apart(ours, -0.5 * published) > APART


@pytest.mark.parametrize("target", ["finals", "estimates", "path"])
def test_the_proxy_learns_by_flow_matching(target: Any) -> None:
    """``|v - (eps - x_0)|^2`` (Lipman et al., arXiv 2210.02747, equation 23 for the straight path), which is
    DMD's denoising (arXiv 2311.18828, equation 6), ``|mu_fake(x_t, t) - x_0|^2``, weighted by ``1 / t^2``."""
    student, proxy, random, points, step = small(1), small(2), recorded(2), batch(), 2
    matching = DistributionMatching(guided(), proxy, "shared-free", target)
    loss = matching.proxy_loss(Rollout(student, GRID), points, random)["proxy"]
    walked = states(student, random.noises[0], points.cond)
    x, t_i, t_end = walked[step], GRID[step], GRID[step + 1]
    with torch.no_grad():
        v_i = student(x, rows(t_i), points.cond)
    x0 = walked[-1] if target == "finals" else x - t_i * v_i
    if target == "path":
        noise, t = x + (1 - t_i) * v_i, t_end + (t_i - t_end) * random.drawn_times[0].clamp(T_MIN, T_MAX)
    else:
        noise, t = random.noises[1], random.drawn_times[0]
    x_t = (1 - column(t)) * x0 + column(t) * noise
    v = proxy(x_t, t, points.cond)
    error = v - (noise - x0)
    ours = gradient(loss, proxy)
    assert apart(loss, (error * error).mean()) < EQUAL
    assert apart(ours, jacobian(v, proxy, 2 * error)) < EQUAL

    def denoising(weight: Callable[[Any], Any]) -> Any:
        mu = x_t - column(t) * proxy(x_t, t, points.cond)
        return gradient((weight(column(t)) * (mu - x0) ** 2).mean(), proxy)

    assert apart(ours, denoising(lambda t: 1 / t**2)) < EQUAL
    assert apart(ours, denoising(torch.ones_like)) > APART
