"""Trajectory distribution matching (TDM, Luo et al., arXiv 2503.06674), without data.

Each step of the student has its own interval of time, (t_{i+1}, t_i]. From the state where the step ends,
fresh noise leads to a time of that interval. The scores are compared there, and the proxy is trained there.
So the proxy models what is compared, at every step: the marginals of the trajectory, not those of its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.anchor import anchored
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.dmd import T_MAX, T_MIN, GradientOn, moved
from fewstep.methods.rollout import Rollout, rollouts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def forward_diffuse(x: Tensor, noise: Tensor, t_from: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noise ``x`` from time ``t_from`` to the later times ``t [B]``.

    ``x_t = a x + b eps`` with ``a = (1 - t) / (1 - t_from)`` and ``b^2 = t^2 - (a t_from)^2``: two steps of
    the forward process equal one. Given ``x``, the score is ``-eps / b``, so the noise that a velocity
    predicts is ``t eps / b``.

    Returns:
        the state at ``t``, and the velocity that a denoiser regresses there.
    """
    a, time = (1 - t) / (1 - t_from), flow.expand(t, x)
    b = (t * t - (a * t_from) ** 2).sqrt()
    x_t = flow.expand(a, x) * x + flow.expand(b, x) * noise
    return x_t, (flow.expand(t / b, x) * noise - x_t) / (1 - time)


@dataclass(frozen=True)
class TDM:
    """Distribution matching of each student step on its own interval of time.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        proxy: the proxy's module.
        proxy_velocity: the proxy as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: the student's times.
        proxy_updates: updates of the proxy before each of the student's.
        gradient_on: what the gradient moves; ``state`` is the end of the step.
        fresh_rollouts: whether each update of the proxy sees trajectories of its own.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
    """

    student: Module
    velocity: Velocity
    proxy: Module
    proxy_velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]
    proxy_updates: int = 5
    gradient_on: GradientOn = "x0"
    fresh_rollouts: bool = False
    trajectory_weight: float = 0.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, "proxy": self.proxy}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        return [
            *(
                Update("proxy", partial(self._proxy_loss, own))
                for own in rollouts(rollout, self.proxy_updates, self.fresh_rollouts)
            ),
            anchored(
                Update("student", partial(self._student_loss, rollout)),
                self.velocity,
                self.grid,
                self.trajectory_weight,
            ),
        ]

    def _proxy_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        index = rollout.pick(random)
        x = rollout.simulated_step(batch, random, index).end
        t = self._times(index, x, random)
        x_t, v = forward_diffuse(x, random.noise(x), self.grid[index + 1], t)
        # The error is weighted in terms of noise: near t = 1 the target velocity grows without bound.
        weight = 1 - flow.expand(t, x)
        error = weight * (self.proxy_velocity(x_t, t, batch.cond) - v)
        return {"proxy": (error * error).mean()}

    def _student_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        import torch

        index = rollout.pick(random)
        step = rollout.step(batch, random, index)
        t = self._times(index, step.x, random)
        with torch.no_grad():
            x_t, _ = forward_diffuse(step.end, random.noise(step.x), step.t_next, t)
            proxy = flow.to_x0(x_t, self.proxy_velocity(x_t, t, batch.cond), t)
            teacher = flow.to_x0(x_t, self.teacher(x_t, t, batch.cond), t)
        x = moved(step, step.end, self.gradient_on)
        matching = losses.distribution_matching(x, proxy, teacher, step.x0)
        return {"matching": matching, **rollout.figures(batch, random)}

    def _times(self, index: int, like: Tensor, random: StepRandom) -> Tensor:
        t, t_next = min(self.grid[index], T_MAX), self.grid[index + 1]
        return t_next + (t - t_next) * random.times(schedule.uniform, like).clamp(T_MIN, T_MAX)
