"""Distillations without weights and samples, for ``fewstep estimate-memory``.

A family is built from its configuration alone, so that the recipes themselves run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import Batch, Cond
from fewstep.data.teacher_samples.manifest import Plan
from fewstep.data.teacher_samples.read import TeacherSamples
from fewstep.distill.config import DistillConfig
from fewstep.distill.context import DistillContext
from fewstep.distill.setup import build_context, make_adapters
from fewstep.families.base import Family
from fewstep.families.presets import SD35_MEDIUM
from fewstep.families.spec import ModelSpec

if TYPE_CHECKING:
    from torch.nn import Module


def fake_net(spec: ModelSpec, dtype: str, device: str = "cpu") -> Module:
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

    def student(self, net: Module, name: str, steps: int) -> Family:
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
    """The options of a distillation whose teacher and samples have shapes and no content.

    Attributes:
        shape: of the teacher.
        side: pixels along a side of an image.
    """

    shape: ModelSpec = SD35_MEDIUM
    side: int = 1024


@build_context.register(FakeSetup)
def build_fake_context(
    config: FakeSetup,
    name: str,
    *,
    trajectories: bool = False,
    split: bool = False,
    folder: Path | None = None,
) -> DistillContext:
    """Build the context of a distillation without weights and without samples."""
    import torch

    shape, family = config.shape, _family(config)
    plan = Plan(
        teacher=shape.name, weights="", text="", dtype=config.dtype, t5=shape.t5 is not None,
        guidance=family.embedded_guidance if family.guidance is None else family.guidance,
        steps=config.student_steps, student_steps=config.student_steps,
        shift=family.shift, seed=0, number=max(config.batch_size, 2), captions="", per_shard=1,
        pictures=False,
        latent=family.latent, context=shape.context_shape,
        pooled=shape.pooled_dim, clip_length=family.clip_length,
    )  # fmt: skip
    null = Cond(torch.zeros(1, *plan.context), torch.zeros(1, plan.pooled))
    samples = FakeSamples(Path(), plan, [""] * plan.number, null, np.zeros((0, 3), np.int64))
    adapters = make_adapters(replace(config, init=None), family, split) if config.lora else None
    return DistillContext(
        config, name, folder or Path(name), family, samples, family, type(family.net), adapters
    )


def _family(config: FakeSetup) -> Family:
    spec, architecture = config.shape, config.shape.architecture
    net = fake_net(spec, config.dtype, config.device)
    side = config.side // spec.downscale
    whole = architecture.assemble(spec.stand_ins(), name=spec.name, side=side)
    velocity: Any = whole.velocity
    known = {each.name: getattr(whole, each.name) for each in fields(whole)}
    changed: dict[str, Any] = {
        "velocity": replace(velocity, net=net), "net": net, "text": None, "codec": None, "parts": {},
        "blocks": architecture.blocks(net),
    }  # fmt: skip
    return NetOnlyFamily(**known | changed)
