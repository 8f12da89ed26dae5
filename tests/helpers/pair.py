"""A tiny SD3 in one process or two: ``python -m tests.helpers.pair FOLDER STAGE`` as torchrun starts it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny
from fewstep.core import flow
from fewstep.core.types import Batch, BatchSlice, Cond
from fewstep.families import sd3
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.flow_matching import FlowMatching
from fewstep.modules.lora import LoRARoles
from fewstep.train.run import Run, TrainOptions

STEPS = {"full": 20, "roles": 12}
BATCH = 4


class Parts:
    """What a family is to a trainer."""

    def __init__(self) -> None:
        from diffusers import SD3Transformer2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net: Any = SD3Transformer2DModel(
                **tiny.SMALL | {"num_layers": 2, "dual_attention_layers": (0,)}
            )
        self.blocks = list(self.net.transformer_blocks)
        self.velocity = sd3.NetVelocity(self.net)


def batches(step: int, share: BatchSlice) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = share.slice_of(BATCH)
    context = torch.randn(BATCH, 3, 64, generator=generator)
    cond = Cond(context, torch.randn(BATCH, 56, generator=generator))
    return Batch(torch.randn(BATCH, 4, 8, 8, generator=generator)[rows], cond[rows])


class Trio:
    """Matching with roles, and a head that is in no body; now and then the proxy follows the student."""

    def __init__(self, parts: Parts) -> None:
        self.roles = LoRARoles(parts.net, rank=2, targets=sd3.TARGETS)
        self.of = {name: self.roles.velocity(name, parts.velocity) for name in ("student", "proxy", None)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("RANK", 0)))  # processes shall agree even so
            head = torch.nn.Linear(4, 1)
        self.nets: dict[str, Any] = {name: self.roles.net(name) for name in self.roles.names} | {"head": head}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        follow = [InPlaceUpdate("proxy", self._follow)] if step % 6 == 5 else []
        learn = [Update("proxy", self._proxy), Update("head", self._head), Update("student", self._student)]
        return [*follow, *learn]

    def _follow(self, draw: StepRandom) -> Sequence[Any]:
        pairs = list(zip(self.nets["proxy"].parameters(), self.nets["student"].parameters(), strict=True))
        for mine, its in pairs:
            mine.lerp_(its, 0.5)
        return [mine for mine, _ in pairs]

    def _drawn(self, batch: Batch, draw: StepRandom) -> Any:
        noise = draw.noise(batch.latents)
        t = torch.full((len(noise),), 0.9)
        return flow.to_x0(noise, self.of["student"](noise, t, batch.cond), t)

    def _proxy(self, batch: Batch, draw: StepRandom) -> Losses:
        with torch.no_grad():
            x0 = self._drawn(batch, draw)
        return {"proxy": FlowMatching(None, self.of["proxy"]).losses(Batch(x0, batch.cond), draw)["flow"]}

    def _head(self, batch: Batch, draw: StepRandom) -> Losses:
        with torch.no_grad():
            x0 = self._drawn(batch, draw)
        return {"head": (self.nets["head"](x0.mean((2, 3))) - 1).square().mean()}

    def _student(self, batch: Batch, draw: StepRandom) -> Losses:
        x0 = self._drawn(batch, draw)
        t = torch.full((len(x0),), 0.5)
        x_t = flow.interpolate(x0, draw.noise(x0), t)
        with torch.no_grad():
            real = self.of[None](x_t, t, batch.cond)
        gap = (self.of["proxy"](x_t, t, batch.cond) - real).square().mean()
        fooled = self.nets["head"](x0.mean((2, 3))).square().mean()
        return {"gap": gap, "fooled": fooled, "latent/mean": x0.mean().detach()}


def run_of(folder: Path, kind: str, steps: int = 0, **options: Any) -> Run:
    """``kind``: ``full`` fine-tunes the whole net, ``roles`` trains LoRAs of a frozen base in bf16."""
    parts = Parts()
    settings: dict[str, Any] = {
        "warmup": 2 / (steps or STEPS[kind]),
        "decay": 0.0,
        "save_minutes": 60.0,
        "precision": "fp32",
    } | options
    if kind == "full":
        method: Any = FlowMatching(parts.net, parts.velocity)
    else:
        method = Trio(parts)

    def finish(nets: dict[str, Any]) -> None:
        told = {name: dict(net.state_dict()) for name, net in nets.items()}
        if kind == "roles":
            told["merged"] = method.roles.merged("student")
        else:
            told["drawn"] = {"v": parts.velocity(*_probe())}
        torch.save(told, folder / "finished.pt")

    return Run(
        kind,
        folder,
        method,
        batches,
        TrainOptions(steps or STEPS[kind], 3e-3, **settings),
        {"recipe": kind},
        finish=finish,
        bodies=[parts],
        preview=lambda nets: Sheet(parts),
        score=lambda nets: float(Sheet(parts).value.std()),
    )


class Sheet:
    """A sheet that takes a look at the net, as drawing does."""

    def __init__(self, parts: Parts) -> None:
        self.value = parts.velocity(*_probe())

    def save(self, path: Path) -> None:
        path.write_text(str(float(self.value.std())))


def _probe() -> tuple[Any, Any, Cond]:
    batch = batches(0, BatchSlice())
    return batch.latents, torch.full((BATCH,), 0.5), batch.cond


def losses(run: Run) -> list[dict[str, float]]:
    """Carry a run out, and tell each step's figures."""
    from fewstep.train.train_step import State
    from fewstep.train.trainer import train

    told: list[dict[str, float]] = []
    plain = State.train_step

    def advance(state: State) -> dict[str, float]:
        told.append(plain(state))
        return told[-1]

    State.train_step = advance  # type: ignore[method-assign]
    try:
        train(run)
    finally:
        State.train_step = plain  # type: ignore[method-assign]
    return told


def until_killed(run: Run, step: int) -> Run:
    """A run whose processes vanish when they ask for the batch of a step."""

    def given(now: int, share: BatchSlice) -> Batch:
        if now == step:
            os.kill(os.getpid(), 9)
        return batches(now, share)

    return replace(run, batches=given)


def main(folder: Path, stage: str) -> None:
    stages: dict[str, Callable[[], list[tuple[str, Run]]]] = {
        "first": lambda: [
            ("full", run_of(folder / "full2", "full", validate_every=10)),
            (
                "roles",
                run_of(
                    folder / "roles2", "roles", activation_checkpointing=True, gradient_accumulation_steps=2
                ),
            ),
            ("resharded", run_of(folder / "one", "full")),
            ("half", run_of(folder / "half", "full", 3, precision="bf16")),
            (
                "killed",
                until_killed(run_of(folder / "cut", "roles", save_minutes=0.0), int(folder.name[-1]) + 4),
            ),
        ],
        "second": lambda: [
            ("cut", run_of(folder / "cut", "roles")),
            ("whole", run_of(folder / "whole", "roles")),
        ],
    }
    for name, run in stages[stage]():
        told = losses(run)
        if os.environ["RANK"] == "0":
            (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200)
    warnings.simplefilter("error")
    main(Path(sys.argv[1]), sys.argv[2])
