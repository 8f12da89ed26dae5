"""Trajectory distribution matching, a rival (TDM, Luo et al., arXiv 2503.06674), without data.

Each step of the student has a stretch of time of its own, (t_{i+1}, t_i]. Where the step arrives, fresh
noise carries the state on to a time of that stretch; there the scores are compared, and there the proxy
learns. So the proxy models exactly what is compared, for every step: the path's own marginals, not the
end's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.dmd import LEAST, MOST
from fewstep.methods.rollout import Rollout


def forward_diffuse(x: Any, noise: Any, t_from: float, t: Any) -> tuple[Any, Any]:
    """The forward process from ``t_from`` on to ``t [B]``: the state, and the velocity that its denoiser
    learns.

    ``x_t = a x + b eps`` with ``a = (1 - t) / (1 - t_from)`` and ``b^2 = t^2 - (a t_from)^2``: what was
    noised to ``t_from`` and goes on to ``t`` is as if it had been noised to ``t`` at once. Given ``x``, the
    score is ``-eps / b``, so the noise that a velocity answers for is ``t eps / b``.
    """
    a, time = (1 - t) / (1 - t_from), flow.expand(t, x)
    b = (t * t - (a * t_from) ** 2).sqrt()
    x_t = flow.expand(a, x) * x + flow.expand(b, x) * noise
    return x_t, (flow.expand(t / b, x) * noise - x_t) / (1 - time)


@dataclass(frozen=True)
class Tdm:
    """The student's steps are matched each on its own stretch of time.

    Attributes:
        student: the module that learns, a few-step net.
        velocity: the same as a velocity.
        proxy: the proxy's module.
        proxy_velocity: the same as a velocity.
        teacher: the guided teacher; gets no gradient.
        grid: the student's times.
        updates: turns of the proxy before each of the student's.
    """

    student: Any
    velocity: Velocity
    proxy: Any
    proxy_velocity: Velocity
    teacher: Velocity
    grid: Sequence[float]
    updates: int = 5

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student, "proxy": self.proxy}

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        turns: list[Update | InPlaceUpdate] = [Update("proxy", partial(self._learn, rollout))] * self.updates
        return [*turns, Update("student", partial(self._match, rollout))]

    def _learn(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        index = rollout.pick(draw)
        x = rollout.states(batch, draw)[index + 1]
        t = self._times(index, x, draw)
        x_t, v = forward_diffuse(x, draw.noise(x), self.grid[index + 1], t)
        # In terms of noise: near t = 1 the velocity that is asked for grows without bound.
        weight = 1 - flow.expand(t, x)
        error = weight * (self.proxy_velocity(x_t, t, batch.cond) - v)
        return {"proxy": (error * error).mean()}

    def _match(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        import torch

        index = rollout.pick(draw)
        move = rollout.move(batch, draw, index)
        t = self._times(index, move.x, draw)
        with torch.no_grad():
            x_t, _ = forward_diffuse(move.end, draw.noise(move.x), move.t_next, t)
            proxy = flow.to_x0(x_t, self.proxy_velocity(x_t, t, batch.cond), t)
            teacher = flow.to_x0(x_t, self.teacher(x_t, t, batch.cond), t)
        matching = losses.distribution_matching(move.end, proxy, teacher, move.x0)
        return {"matching": matching, **rollout.figures(batch, draw)}

    def _times(self, index: int, like: Any, draw: StepRandom) -> Any:
        t, t_next = min(self.grid[index], MOST), self.grid[index + 1]
        return t_next + (t - t_next) * draw.times(schedule.uniform, like).clamp(LEAST, MOST)
