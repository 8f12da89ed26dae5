"""What several methods share: the student's own walk from noise, made once a step.

A student that learns only on points of its teacher's walks meets its own errors first in use. So it learns on
its own walk (backward simulation, DMD2, arXiv 2405.14867, section 4.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.core import flow, sampling
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import StepRandom


@dataclass(frozen=True)
class RolloutStep:
    """One step of the student, with its gradient.

    Attributes:
        x: where it starts, ``[B, C, H, W]``, without gradient.
        v: the student's velocity there.
        t: the time there.
        t_next: the time where it arrives.
    """

    x: Any
    v: Any
    t: float
    t_next: float

    @property
    def end(self) -> Any:
        """Where it arrives."""
        return self.x + (self.t_next - self.t) * self.v

    @property
    def x0(self) -> Any:
        """The clean estimate."""
        return flow.to_x0(self.x, self.v, self.t)

    def at(self, t: float | Any) -> Any:
        """The point of time ``t`` on the straight line through ``x`` along ``v``: (1 - t) x̂_0 + t ε̂."""
        return flow.interpolate(self.x0, flow.to_noise(self.x, self.v, self.t), t)


@dataclass(frozen=True)
class Rollout:
    """The student's walks of one training step, made when they are first asked for and then kept.

    The student does not move while the proxy and the heads learn, so all turns of a step read the same walks.
    Make a new one for every step.

    Attributes:
        velocity: the student.
        grid: its times, descending from 1 to 0.
        learns: the steps of the grid that learn; all of them where it is empty.
    """

    velocity: Velocity
    grid: Sequence[float]
    learns: Sequence[int] = ()
    _kept: dict[int, list[Any]] = field(default_factory=dict[int, list[Any]])

    @property
    def steps(self) -> int:
        """Steps of a walk."""
        return len(self.grid) - 1

    def pick(self, draw: StepRandom) -> int:
        """One of the steps that learn: the same for the whole batch, in every process."""
        steps = self.learns or range(self.steps)
        return int(steps[int(draw.rng.integers(len(steps)))])

    def states(self, batch: Batch, draw: StepRandom) -> list[Any]:
        """States at every time of the grid, ``steps + 1`` times ``[B, C, H, W]``, without gradient."""
        import torch

        part = draw.share.part
        if part not in self._kept:
            states = [draw.noise(batch.latents)]
            with torch.no_grad():
                for i in range(self.steps):
                    step = self.grid[i : i + 2]
                    states.append(sampling.sample_flow(self.velocity, states[-1], step, batch.student_cond))
            self._kept[part] = states
        return self._kept[part]

    def finals(self, batch: Batch, draw: StepRandom) -> Any:
        """What the student draws, ``[B, C, H, W]``, without gradient."""
        return self.states(batch, draw)[-1]

    def figures(self, batch: Batch, draw: StepRandom) -> dict[str, Any]:
        """Mean and spread of what the student draws: what the log shows and a watch for collapse reads."""
        finals = self.finals(batch, draw)
        return {"latent/mean": finals.mean(), "latent/std": finals.std()}

    def move(self, batch: Batch, draw: StepRandom, index: int) -> RolloutStep:
        """Step ``index`` of the walk, with its gradient."""
        x, t = self.states(batch, draw)[index], self.grid[index]
        return RolloutStep(
            x, self.velocity(x, flow.expand_time(t, x), batch.student_cond), t, self.grid[index + 1]
        )

    def whole(self, batch: Batch, draw: StepRandom) -> Any:
        """The end of the walk, with the gradient of every step, ``[B, C, H, W]``."""
        return sampling.sample_flow(self.velocity, self.states(batch, draw)[0], self.grid, batch.student_cond)
