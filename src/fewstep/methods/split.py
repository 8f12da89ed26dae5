"""Split-timestep fine-tuning: two branches of the student, each trained on its half of the times.

SD3.5-Flash (arXiv 2509.21318): one branch is trained at t in (0, 0.5], one at t in (0.5, 1], with the losses
of the stage before. Their weights are then merged (:func:`fewstep.modules.timestep_experts.merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fewstep.core.types import UserError
from fewstep.methods.base import InPlaceUpdate, Update
from fewstep.methods.flash import Flash
from fewstep.methods.rollout import Rollout
from fewstep.modules.timestep_experts import split_grid

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Split:
    """Both branches are trained, on trajectories that they sample together.

    Attributes:
        early: the module that is trained at t in (0, 0.5].
        late: the module that is trained at t in (0.5, 1].
        flash: the losses; its velocity is a :class:`~fewstep.modules.timestep_experts.TimestepExperts`.

    Raises:
        UserError: all times of the grid belong to one branch.
    """

    early: Module
    late: Module
    flash: Flash

    def __post_init__(self) -> None:
        if not all(split_grid(self.flash.grid)):
            raise UserError(
                f"a grid of {len(self.flash.grid) - 1} steps has all its times in one branch: "
                "there is nothing to split"
            )

    @property
    def nets(self) -> dict[str, Module]:
        return {"early": self.early, "late": self.late, **self.flash.auxiliary_nets}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.flash.velocity, self.flash.grid)
        early, late = (
            partial(self.flash.losses, replace(rollout, trained_steps=steps))
            for steps in split_grid(self.flash.grid)
        )
        return [*self.flash.auxiliary_updates(rollout), Update("early", early), Update("late", late)]
