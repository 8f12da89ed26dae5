"""A distillation's parts by their shapes alone: a family from its configuration and samples without content,
so that ``fewstep estimate-memory`` runs the very recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import Batch, Cond
from fewstep.data.teacher_samples.manifest import Plan
from fewstep.data.teacher_samples.read import TeacherSamples
from fewstep.distill.context import DistillConfig, DistillContext
from fewstep.distill.setup import make_lora_roles
from fewstep.families.base import Family
from fewstep.families.presets import SD35_MEDIUM
from fewstep.families.spec import ModelSpec


def fake_net(spec: ModelSpec, dtype: str, device: str = "cpu") -> Any:
    """Return the transformer of a spec with arbitrary weights, frozen.

    Raises:
        UserError: its configuration makes no net.
    """
    import torch

    from fewstep.inference.meta_init import init_from_config
    from fewstep.modules.memory_tracker import cast_parameters

    with torch.device(device):
        net = init_from_config(spec, "transformer")
    return cast_parameters(net, getattr(torch, dtype)).eval()


@dataclass(frozen=True, kw_only=True)
class NetOnlyFamily(Family):
    """A family that is a net alone: no text encoders, no codec."""

    def student(self, net: Any, name: str, steps: int) -> Family:
        from fewstep.modules.memory_tracker import cast_parameters

        velocity: Any = self.velocity
        net = cast_parameters(net)
        return replace(
            self, net=net, velocity=replace(velocity, net=net), blocks=self.architecture.blocks(net)
        )


class FakeSamples(TeacherSamples):
    """Samples that hold nothing but their shapes."""

    def read(self, rows: Sequence[int]) -> Batch:
        import torch

        states, context, pooled = (
            torch.zeros(len(rows), *self.plan.shape(kind)) for kind in ("states", "context", "pooled")
        )
        return Batch(states[:, -1], Cond(context, pooled), [""] * len(rows), states)


@dataclass(frozen=True)
class FakeSetup(DistillConfig):
    """A distillation of shapes: its recipe's lessons are made of them.

    Attributes:
        shape: of the teacher.
        side: pixels along a side of a picture.
    """

    shape: ModelSpec = SD35_MEDIUM
    side: int = 1024

    def lesson(
        self, name: str, *, walks: bool = False, split: bool = False, folder: Path | None = None
    ) -> DistillContext:
        shape = self.shape
        family = self._family()
        plan = Plan(
            teacher=shape.name, weights="", text="", dtype=self.dtype, t5=shape.t5 is not None,
            guidance=family.embedded_guidance if family.guidance is None else family.guidance,
            steps=self.student_steps, student_steps=self.student_steps,
            shift=family.shift, seed=0, number=max(self.batch_size, 2), captions="", per_shard=1,
            pictures=False,
            latent=family.latent, context=shape.context_shape,
            pooled=shape.pooled_dim, clip_length=family.clip_length,
        )  # fmt: skip
        import torch

        null = Cond(torch.zeros(1, *plan.context), torch.zeros(1, plan.pooled))
        made = FakeSamples(Path(), plan, [""] * plan.number, null, np.zeros((0, 3), np.int64))
        roles = make_lora_roles(replace(self, init=None), family, split) if self.lora else None
        return DistillContext(self, name, folder or Path(name), family, made, family, type(family.net), roles)

    def _family(self) -> Family:
        net = fake_net(self.shape, self.dtype, self.device)
        side = self.side // self.shape.downscale
        whole = self.shape.architecture.assemble(self.shape.stand_ins(), name=self.shape.name, side=side)
        velocity: Any = whole.velocity
        known = {each.name: getattr(whole, each.name) for each in fields(whole)}
        changed: dict[str, Any] = {
            "velocity": replace(velocity, net=net), "net": net, "text": None, "codec": None, "parts": {},
            "blocks": self.shape.architecture.blocks(net),
        }  # fmt: skip
        return NetOnlyFamily(**known | changed)
