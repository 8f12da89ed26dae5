"""Distribution matching: the student's samples move by the difference of two scores.

DMD (Yin et al., arXiv 2311.18828) and DMD2 (arXiv 2405.14867): the guided teacher's score says where the
samples should be, a proxy's where they are. The proxy, a copy of the teacher, learns all the while by flow
matching on what the student draws. Where the two are compared is a choice (:data:`Where`); SD3.5-Flash
(arXiv 2509.21318) takes the student's own path at the times of its grid, *timestep sharing*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.rollout import Rollout, RolloutStep

Where = Literal["shared", "shared-free", "renoise"]
"""Where the scores are taken.

``shared``: at the student's own next state, at the grid's time, without fresh noise; the last step, which
arrives where no score is, half its way. ``shared-free``: on the same path, at a
time drawn freely within the step. ``renoise``: the clean estimate, freshly noised to any time (DMD2).
"""

Proxied = Literal["finals", "estimates", "path"]
"""What the proxy models: the samples at the end of the student's walk, the clean estimates of a random
step, or the states of the path with the student's own noise."""

LEAST, MOST = 0.02, 0.98
"""Times between which scores are compared: nearer to 0 a score is large and says little, at 1 all agree."""


@dataclass(frozen=True)
class DistributionMatching:
    """The losses of distribution matching, for a method to put in turns.

    Attributes:
        teacher: the guided teacher; gets no gradient.
        proxy: the proxy as a velocity.
        score_point: where the scores are taken.
        proxy_target: what the proxy models.
        density: times at which the proxy learns, and at which ``renoise`` compares.
    """

    teacher: Velocity
    proxy: Velocity
    score_point: Where = "shared"
    proxy_target: Proxied = "finals"
    density: schedule.Density = schedule.uniform

    def proxy_loss(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        """The proxy's loss: flow matching on what the student draws."""
        x0, noise, t = self._drawn(rollout, batch, draw)
        v = self.proxy(flow.interpolate(x0, noise, t), t, batch.cond)
        return {"proxy": losses.flow_matching(v, noise, x0)}

    def student_loss(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        """The student's loss, at one step of its walk."""
        move = rollout.move(batch, draw, rollout.pick(draw))
        x, x_t, t = self._compared(move, draw)
        return {"matching": self.dmd_loss(x, x_t, t, move.x0, batch), **rollout.figures(batch, draw)}

    def dmd_loss(self, x: Any, x_t: Any, t: Any, x0: Any, batch: Batch) -> Any:
        """The loss of ``x``, whose scores are compared at ``x_t`` and ``t [B]``; the student meant ``x0``."""
        import torch

        with torch.no_grad():
            x_t = x_t.detach()
            proxy = flow.to_x0(x_t, self.proxy(x_t, t, batch.cond), t)
            teacher = flow.to_x0(x_t, self.teacher(x_t, t, batch.cond), t)
        return losses.distribution_matching(x, proxy, teacher, x0)

    def _drawn(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> tuple[Any, Any, Any]:
        """What the proxy learns from: clean samples, noise, and times ``[B]``."""
        import torch

        if self.proxy_target == "finals":
            x0 = rollout.finals(batch, draw)
            return x0, draw.noise(x0), draw.times(self.density, x0)
        index = rollout.pick(draw)
        with torch.no_grad():
            move = rollout.move(batch, draw, index)
        if self.proxy_target == "estimates":
            return move.x0, draw.noise(move.x0), draw.times(self.density, move.x0)
        return move.x0, flow.to_noise(move.x, move.v, move.t), flow.expand_time(_arrival(move), move.x)

    def _compared(self, move: RolloutStep, draw: StepRandom) -> tuple[Any, Any, Any]:
        """What moves, the point where its scores are compared, and the time there ``[B]``."""
        if self.score_point == "renoise":
            t = draw.times(self.density, move.x).clamp(LEAST, MOST)
            return move.x0, flow.interpolate(move.x0, draw.noise(move.x), t), t
        if self.score_point == "shared-free":
            t = draw.times(schedule.uniform, move.x)
            t = move.t_next + (move.t - move.t_next) * t.clamp(LEAST, MOST)
        else:
            t = flow.expand_time(_arrival(move), move.x)
        return move.at(t), move.at(t), t


def _arrival(move: RolloutStep) -> float:
    """Where a step arrives; of the last one, which arrives where no score is, half its way.

    Not the last time of the grid: there that step starts, and a point where it starts does not depend on it.
    """
    return move.t_next or move.t / 2


def implicit_distribution_alignment(
    proxy: Any, student: Any, decay: float, draw: StepRandom
) -> Sequence[Any]:
    """The proxy follows the student, ``phi <- decay phi + (1 - decay) theta``: implicit distribution
    alignment.

    SenseFlow (Ge et al., arXiv 2506.00523, section 4.1). Its optimizer keeps what it knows.
    """
    for mine, its in zip(proxy.parameters(), student.parameters(), strict=True):
        mine.lerp_(its.to(mine.dtype), 1 - decay)
    return ()


@dataclass(frozen=True)
class Dmd:
    """Distribution matching alone.

    Attributes:
        student: the module that learns, a few-step net.
        velocity: the same as a velocity.
        proxy: the module of ``matching.proxy``.
        matching: the losses.
        grid: the student's times.
        updates: turns of the proxy before each of the student's (DMD2: 5).
        follow: how much of itself the proxy keeps when it follows the student after a step; 1: all.
    """

    student: Any
    velocity: Velocity
    proxy: Any
    matching: DistributionMatching
    grid: Sequence[float]
    updates: int = 5
    follow: float = 1.0

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student, "proxy": self.proxy}

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        turns: list[Update | InPlaceUpdate] = [
            Update("proxy", partial(self.matching.proxy_loss, rollout))
        ] * self.updates
        turns.append(Update("student", partial(self.matching.student_loss, rollout)))
        if self.follow < 1:
            turns.append(
                InPlaceUpdate(
                    "proxy", partial(implicit_distribution_alignment, self.proxy, self.student, self.follow)
                )
            )
        return turns
