"""Distribution matching: the student's samples move by the difference of two scores.

DMD (Yin et al., arXiv 2311.18828) and DMD2 (arXiv 2405.14867). The guided teacher's score points to where
samples should be, a proxy's to where they are. The proxy, a copy of the teacher, is trained all the while by
flow matching on the student's samples. Where the scores are compared is an option (:data:`ScorePoint`).
SD3.5-Flash (arXiv 2509.21318) compares them on the student's own trajectory at the times of its grid
(*timestep sharing*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Sampler, Velocity
from fewstep.methods.anchor import anchored
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.rollout import Rollout, RolloutStep, rollouts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

ScorePoint = Literal["shared", "shared-free", "renoise"]
"""Where the scores are compared.

``shared``: at the student's own next state, at the grid's time, without fresh noise. The last step ends where
there is no score, so half its interval is taken. ``shared-free``: on the same trajectory, at a random time
within the step. ``renoise``: at the clean estimate, noised to a random time (DMD2).
"""

ProxyTarget = Literal["finals", "estimates", "path"]
"""The target of the proxy: the student's samples, its clean estimates at a random step, or the points of its
trajectory where the scores are compared, with its own noise."""

GradientOn = Literal["state", "x0", "velocity"]
"""What the gradient of matching moves, which sets how much each step weighs.

``state``: the point where the scores are compared, which carries ``t_i - t`` of the velocity of step ``i``.
``x0``: the clean estimate, which carries ``t_i``. ``velocity``: the velocity, so all steps weigh alike.
"""

T_MIN, T_MAX = 0.02, 0.98
"""Range of the times at which scores are compared. Near 0 a score is large and uninformative, and at 1 all
scores agree."""


@dataclass(frozen=True)
class DistributionMatching:
    """The losses of distribution matching.

    Attributes:
        teacher: the guided teacher; gets no gradient.
        proxy: the proxy as a velocity.
        score_point: where the scores are compared.
        proxy_target: what the proxy models.
        proxy_density: of the times at which the proxy is trained; without effect on ``path``.
        score_density: of the times at which ``renoise`` compares.
        gradient_on: what the gradient moves; ``renoise`` has no ``state``.

    Raises:
        ValueError: ``renoise`` with the gradient on a state.
    """

    teacher: Velocity
    proxy: Velocity
    score_point: ScorePoint = "shared"
    proxy_target: ProxyTarget = "finals"
    proxy_density: schedule.Density = schedule.uniform
    score_density: schedule.Density = schedule.uniform
    gradient_on: GradientOn | None = None

    def __post_init__(self) -> None:
        if self.score_point == "renoise" and self.gradient_on == "state":
            raise ValueError(
                "a renoised point is no state of the trajectory: gradient_on must be x0 or velocity"
            )

    def proxy_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the proxy's loss: flow matching on what the student generates."""
        x0, noise, t = self._proxy_batch(rollout, batch, random)
        v = self.proxy(flow.interpolate(x0, noise, t), t, batch.cond)
        return {"proxy": losses.flow_matching(v, noise, x0)}

    def student_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the student's loss, at one random step of its trajectory."""
        step = rollout.step(batch, random, rollout.pick(random))
        x_t, t = self._score_point(step, random)
        on = self.gradient_on or ("x0" if self.score_point == "renoise" else "state")
        x = moved(step, x_t, on)
        return {"matching": self.dmd_loss(x, x_t, t, step.x0, batch), **rollout.figures(batch, random)}

    def dmd_loss(self, x: Tensor, x_t: Tensor, t: Tensor, x0: Tensor, batch: Batch) -> Tensor:
        """Return the matching loss of ``x``.

        Args:
            x: what the gradient moves, ``[B, C, H, W]``.
            x_t: where the scores are compared, ``[B, C, H, W]``.
            t: the time there, ``[B]``.
            x0: the student's clean estimate, which normalises the loss.
            batch: its conditions.
        """
        import torch

        with torch.no_grad():
            x_t = x_t.detach()
            proxy = flow.to_x0(x_t, self.proxy(x_t, t, batch.cond), t)
            teacher = flow.to_x0(x_t, self.teacher(x_t, t, batch.cond), t)
        return losses.distribution_matching(x, proxy, teacher, x0)

    def _proxy_batch(
        self, rollout: Rollout, batch: Batch, random: StepRandom
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the proxy is trained on: clean samples, noise, and times ``[B]``."""
        if self.proxy_target == "finals":
            x0 = rollout.finals(batch, random)
            return x0, random.noise(x0), random.times(self.proxy_density, x0)
        step = rollout.simulated_step(batch, random, rollout.pick(random))
        if self.proxy_target == "estimates":
            return step.x0, random.noise(step.x0), random.times(self.proxy_density, step.x0)
        return step.x0, flow.to_noise(step.x, step.v, step.t), self._path_time(step, random)

    def _score_point(self, step: RolloutStep, random: StepRandom) -> tuple[Tensor, Tensor]:
        """Return the point where the scores are compared, and the time there ``[B]``."""
        if self.score_point == "renoise":
            t = random.times(self.score_density, step.x).clamp(T_MIN, T_MAX)
            return flow.interpolate(step.x0, random.noise(step.x), t), t
        t = self._path_time(step, random)
        return step.at(t), t

    def _path_time(self, step: RolloutStep, random: StepRandom) -> Tensor:
        """Return the times of a step at which its own points are used, ``[B]``."""
        if self.score_point != "shared-free":
            return flow.expand_time(_end_time(step), step.x)
        t = random.times(schedule.uniform, step.x)
        return step.t_next + (step.t - step.t_next) * t.clamp(T_MIN, T_MAX)


def moved(step: RolloutStep, state: Tensor, on: GradientOn) -> Tensor:
    """Return what the gradient of matching moves.

    A gradient ``g`` in terms of clean data moves ``-v`` by ``-g``, because ``x_0 = x_t - t v``.

    Args:
        step: of the student.
        state: the state that the step leads to, ``[B, C, H, W]``.
        on: the choice.
    """
    return {"state": state, "x0": step.x0, "velocity": -step.v}[on]


def _end_time(step: RolloutStep) -> float:
    """Return the time where a step ends; for the last step, which ends at 0, half its interval.

    The start time of the last step would not do: the point there does not depend on the step.
    """
    return step.t_next or step.t / 2


def implicit_distribution_alignment(
    proxy: Module, student: Module, decay: float, random: StepRandom
) -> Sequence[Parameter]:
    """Move the proxy towards the student, ``phi <- decay phi + (1 - decay) theta``.

    SenseFlow (Ge et al., arXiv 2506.00523, section 4.1). The proxy's optimizer state is kept. LoRA adapters
    move in terms of what they add to the weights.
    """
    from fewstep.modules.lora import LoRAParameters, interpolate_adapters

    if isinstance(proxy, LoRAParameters) and isinstance(student, LoRAParameters):
        interpolate_adapters(proxy, student, 1 - decay)
        return ()
    for own, target in zip(proxy.parameters(), student.parameters(), strict=True):
        own.lerp_(target.to(own.dtype), 1 - decay)
    return ()


@dataclass(frozen=True)
class DMD:
    """Distribution matching alone.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        proxy: the module of ``matching.proxy``.
        matching: the losses.
        grid: the student's times.
        proxy_updates: updates of the proxy before each of the student's (DMD2: 5).
        ida_decay: decay of the proxy towards the student after each of its updates; 1 turns it off.
        fresh_rollouts: whether each update of the proxy sees trajectories of its own.
        sampler: how the student's trajectories are sampled.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
    """

    student: Module
    velocity: Velocity
    proxy: Module
    matching: DistributionMatching
    grid: Sequence[float]
    proxy_updates: int = 5
    ida_decay: float = 1.0
    fresh_rollouts: bool = False
    sampler: Sampler = "euler"
    trajectory_weight: float = 0.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, "proxy": self.proxy}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid, sampler=self.sampler)
        return [
            *(
                Update("proxy", partial(self.matching.proxy_loss, own))
                for own in rollouts(rollout, self.proxy_updates, self.fresh_rollouts)
            ),
            anchored(
                Update("student", partial(self.matching.student_loss, rollout)),
                self.velocity,
                self.grid,
                self.trajectory_weight,
            ),
            *ida_updates(self.proxy, self.student, self.ida_decay),
        ]


def ida_updates(proxy: Module, student: Module, decay: float) -> list[InPlaceUpdate]:
    """Return the update that moves the proxy towards the student; none at a decay of 1."""
    follow = partial(implicit_distribution_alignment, proxy, student, decay)
    return [InPlaceUpdate("proxy", follow)] if decay < 1 else []
