"""Split-timestep fine-tuning: two branches of the student, each on its half of the times.

SD3.5-Flash (arXiv 2509.21318): one branch learns at t in (0, 0.5], one at t in (0.5, 1], with the losses of
the stage before; then their weights are merged (:func:`fewstep.modules.timestep_experts.merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fewstep.core.types import UserError
from fewstep.methods.base import InPlaceUpdate, Update
from fewstep.methods.flash import Flash
from fewstep.methods.rollout import Rollout
from fewstep.modules.timestep_experts import split_grid


@dataclass(frozen=True)
class Split:
    """Both branches learn in turn, on walks that they make together.

    Attributes:
        early: the module that learns at t in (0, 0.5].
        late: the module that learns at t in (0.5, 1].
        flash: the losses; its velocity is a :class:`~fewstep.modules.timestep_experts.TimestepExperts`.

    Raises:
        UserError: the grid has all its times on one side: there is nothing to split.
    """

    early: Any
    late: Any
    flash: Flash

    def __post_init__(self) -> None:
        if not all(split_grid(self.flash.grid)):
            raise UserError(
                f"a grid of {len(self.flash.grid) - 1} steps has no time on one side of the border: "
                "there is nothing to split"
            )

    @property
    def nets(self) -> dict[str, Any]:
        return {"early": self.early, "late": self.late, **self.flash.rivals}

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.flash.velocity, self.flash.grid)
        early, late = (
            partial(self.flash.losses, replace(rollout, learns=steps))
            for steps in split_grid(self.flash.grid)
        )
        return [*self.flash.before(rollout), Update("early", early), Update("late", late)]
