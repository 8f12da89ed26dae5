"""The student's own sampling trajectory, simulated once per training step and shared by several losses.

A student that is trained only at points of its teacher's trajectories meets its own errors first at
inference. So it is trained on its own trajectory (backward simulation, DMD2, arXiv 2405.14867, section 4.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fewstep.core import flow, sampling
from fewstep.core.types import Batch, Sampler, Velocity
from fewstep.methods.base import Losses, StepRandom

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RolloutStep:
    """One step of the student, with its gradient.

    Attributes:
        x: the state where it starts, ``[B, C, H, W]``, without gradient.
        v: the student's velocity there.
        t: the time there.
        t_next: the time where it ends.
    """

    x: Tensor
    v: Tensor
    t: float
    t_next: float

    @property
    def end(self) -> Tensor:
        """The state where it ends."""
        return self.x + (self.t_next - self.t) * self.v

    @property
    def x0(self) -> Tensor:
        """The clean estimate."""
        return flow.to_x0(self.x, self.v, self.t)

    def at(self, t: float | Tensor) -> Tensor:
        """Return the point at time ``t`` of the line through ``x`` along ``v``: (1 - t) x̂_0 + t ε̂."""
        return flow.interpolate(self.x0, flow.to_noise(self.x, self.v, self.t), t)


@dataclass(frozen=True)
class Rollout:
    """The student's trajectories of one training step, simulated on first use and then cached.

    The student does not change while the proxy and the heads are updated, so all updates of a step read the
    same trajectories. Make a new one for every training step.

    Attributes:
        velocity: the student.
        grid: its times, descending from 1 to 0.
        trained_steps: indices of the steps that are trained; all of them where it is empty.
        sampler: how a step is taken: along the velocity, or with fresh noise to the next time (stochastic
            backward simulation, DMD2, section 4.5).
    """

    velocity: Velocity
    grid: Sequence[float]
    trained_steps: Sequence[int] = ()
    sampler: Sampler = "euler"
    _cache: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=lambda: {})

    @property
    def steps(self) -> int:
        """Number of steps of a trajectory."""
        return len(self.grid) - 1

    def pick(self, random: StepRandom) -> int:
        """Return the index of a random step among those that are trained, the same in every process."""
        steps = self.trained_steps or range(self.steps)
        return int(steps[int(random.rng.integers(len(steps)))])

    def states(self, batch: Batch, random: StepRandom) -> list[Tensor]:
        """Return the states at the grid's times, ``steps + 1`` of ``[B, C, H, W]``, without gradient."""
        return self._simulate(batch, random, self.steps)[0]

    def simulated_step(self, batch: Batch, random: StepRandom, index: int) -> RolloutStep:
        """Return step ``index`` of the trajectory without gradient; later steps are not simulated for it."""
        states, velocities = self._simulate(batch, random, index + 1)
        return RolloutStep(states[index], velocities[index], self.grid[index], self.grid[index + 1])

    def _simulate(self, batch: Batch, random: StepRandom, steps: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the first states and velocities, of at least ``steps`` steps."""
        import torch

        states, velocities = self._cache.setdefault(random.share.part, ([], []))
        states += [] if states else [random.noise(batch.latents)]
        rule = self._rule(random)
        with torch.no_grad():
            for index in range(len(velocities), steps):
                x, t = states[index], self.grid[index]
                velocities.append(self.velocity(x, flow.expand_time(t, x), batch.student_cond))
                states.append(rule(x, velocities[index], t, self.grid[index + 1], index))
        return states, velocities

    def finals(self, batch: Batch, random: StepRandom) -> Tensor:
        """Return the student's samples, ``[B, C, H, W]``, without gradient."""
        return self.states(batch, random)[-1]

    def figures(self, batch: Batch, random: StepRandom) -> Losses:
        """Return mean and standard deviation of the samples, for the log and the divergence monitor."""
        finals = self.finals(batch, random)
        return {"latent/mean": finals.mean(), "latent/std": finals.std()}

    def step(self, batch: Batch, random: StepRandom, index: int) -> RolloutStep:
        """Return step ``index`` of the trajectory, with its gradient."""
        states, _ = self._simulate(batch, random, index)
        x, t = states[index], self.grid[index]
        v = self.velocity(x, flow.expand_time(t, x), batch.student_cond)
        return RolloutStep(x, v, t, self.grid[index + 1])

    def finals_with_grad(self, batch: Batch, random: StepRandom) -> Tensor:
        """Return the student's samples with the gradient of every step, ``[B, C, H, W]``."""
        noise = self._simulate(batch, random, 0)[0][0]
        return sampling.sample_flow(self.velocity, noise, self.grid, batch.student_cond, self._rule(random))

    def _rule(self, random: StepRandom) -> sampling.StepRule:
        if self.sampler == "euler":
            return sampling.euler

        def step(x: Tensor, v: Tensor, t: float, t_next: float, index: int) -> Tensor:
            return flow.interpolate(flow.to_x0(x, v, t), random.noise(x), t_next)

        return step


def rollouts(rollout: Rollout, count: int, fresh: bool) -> list[Rollout]:
    """Return the rollouts of ``count`` updates: one that they share, or one with its own noise for each."""
    return [replace(rollout, _cache={}) if fresh else rollout for _ in range(count)]
