"""Students, proxies and heads for points on the ring, and how well a student draws it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.core import sampling, schedule
from fewstep.core.types import Batch, BatchSlice, Cond
from fewstep.methods.dmd import DMD, DistributionMatching
from fewstep.methods.flash import Flash
from fewstep.methods.ladd import LADD, AdversarialLoss
from fewstep.methods.lcm import LCM, Target
from fewstep.methods.split import Split
from fewstep.methods.tdm import TDM
from fewstep.methods.trajectory import Trajectory
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps
from fewstep.modules.timestep_experts import TimestepExperts
from fewstep.train.run import Run, TrainOptions
from fewstep.train.trainer import train
from mixture import energy_distance, ring

GRID = schedule.grid(4)


def none(n: int) -> Cond:
    """No condition, as torch tensors."""
    return ring().cond(n).map(torch.from_numpy)


class Net(torch.nn.Module):
    """An MLP as a velocity of points ``[B, 2]``. Steep: between two modes of the ring lies no data."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [10] + [width] * depth
        layers = [layer for a, b in pairwise(sizes) for layer in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))

    def forward(self, x: Any, t: Any, cond: Cond) -> Any:
        waves = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        return self.layers(torch.cat([x, waves.sin(), waves.cos()], 1))

    @property
    def blocks(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, torch.nn.ReLU)]


def net(seed: int = 0, width: int = 128, depth: int = 4) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(width, depth)


def critic(tapped: Net, **options: Any) -> AdversarialLoss:
    width = tapped.layers[0].out_features
    return AdversarialLoss(
        FeatureTaps(tapped, tapped.blocks), DiscriminatorHeads([width] * len(tapped.blocks)), **options
    )


def flash(student: Any, velocity: Any, proxy: Net, **options: Any) -> Flash:
    matching = DistributionMatching(ring(), proxy)
    return Flash(student, velocity, proxy, matching, critic(proxy, weight=0.1), GRID, **options)


def methods() -> dict[str, Any]:
    """Every distillation, small."""
    a, b, p = (net(seed, 16, 2) for seed in (1, 2, 3))
    tapped = net(4, 16, 2)
    made: dict[str, Any] = {
        f"dmd {where} {proxied}": DMD(a, a, p, DistributionMatching(ring(), p, where, proxied), GRID, 2, 0.98)
        for where in ("shared", "shared-free", "renoise")
        for proxied in ("finals", "estimates", "path")
    }
    made |= {
        f"adversarial {judged} {kind}": LADD(
            a, a, critic(tapped, disc_input=judged, kind=kind, reset_probability=0.5), GRID
        )
        for judged in ("finals", "last", "estimates", "noised-data")
        for kind in ("softplus", "hinge")
    }
    return made | {
        "trajectory": Trajectory(a, a, GRID),
        "tdm": TDM(a, a, p, p, ring(), GRID, 2),
        "consistency": LCM(a, a, ring(), schedule.grid(32)),
        "consistency ema": LCM(a, a, ring(), schedule.grid(32), Target(b, b, 0.5), "l2"),
        "flash": flash(a, a, p, proxy_updates=2, ida_decay=0.98),
        "split": Split(a, b, flash(a, TimestepExperts(a, b), p, proxy_updates=2)),
    }


@dataclass(frozen=True)
class Walked:
    """The teacher's walks as batches: states ``[N, 5, 2]``, fine Euler between the times of the grid."""

    states: torch.Tensor

    def __call__(self, batch: int) -> Any:
        def rows(step: int, share: BatchSlice) -> Batch:
            drawn = np.random.default_rng(step).integers(0, len(self.states), batch)[share.slice_of(batch)]
            states = self.states[torch.from_numpy(drawn)]
            return Batch(states[:, -1], none(len(states)), (), states)

        return rows


def walked(many: int, substeps: int = 8) -> Walked:
    fine = schedule.grid(4 * substeps)
    states = [torch.from_numpy(np.random.default_rng(0).standard_normal((many, 2), np.float32))]
    for i in range(4):
        part = fine[i * substeps : (i + 1) * substeps + 1]
        states.append(sampling.sample_flow(ring(), states[-1], part, none(many)))
    return Walked(torch.stack(states, 1))


def taught(
    folder: Path,
    method: Any,
    batches: Any,
    steps: int,
    lr: float,
    rates: dict[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Carry out a run by the real trainer; the nets, averaged where they are students."""
    options = TrainOptions(
        steps, lr, seed=seed, net_lrs=rates or {}, warmup=10 / steps, decay=0.7, ema=0.99, weight_decay=0.0,
        precision="fp32", device="cpu", log_every=10**6, save_minutes=60.0,
    )  # fmt: skip
    kept: dict[str, Any] = {}
    students = [name for name in method.nets if name not in ("proxy", "heads", "target")]
    run = Run("ring", folder, method, batches, options, {"recipe": "ring"}, averaged=students,
              finish=lambda nets: kept.update(copy.deepcopy(nets)))  # fmt: skip
    train(run)
    return kept


def kept(
    folder: Path,
    method: Any,
    batches: Any,
    steps: int,
    lr: float,
    rates: dict[str, float] | None = None,
    seed: int = 0,
    every: int = 10**6,
) -> dict[int, Any]:
    """Carry out a run as :func:`taught` does; its first net with EMA weights by step, every so many."""
    copies: dict[int, Any] = {}
    name = next(iter(method.nets))

    def keep(weights: Any, step: int) -> None:
        copies[step] = copy.deepcopy(method.nets[name])
        copies[step].load_state_dict(weights[name])

    options = TrainOptions(
        steps, lr, seed=seed, net_lrs=rates or {}, warmup=20 / steps, decay=0.0, ema=0.99, weight_decay=0.0,
        precision="fp32", device="cpu", log_every=10**6, save_minutes=60.0, keep_every=every, threads=1,
    )  # fmt: skip
    run = Run("ring", folder, method, batches, options, {"recipe": "ring"}, averaged=[name], keep=keep)
    train(run)
    return copies


@dataclass(frozen=True)
class Quality:
    """Of 4-step samples: energy distance to the truth, share off every mode (4 sigma), worst weight of a mode
    (1 is right)."""

    distance: float
    off: float
    weight: float


def quality(velocity: Any, n: int = 16_000) -> Quality:
    truth = ring()
    start = torch.from_numpy(np.random.default_rng(5).standard_normal((n, 2), np.float32))
    with torch.no_grad():
        ends = sampling.sample_flow(velocity, start, GRID, none(n)).numpy()
    apart = np.linalg.norm(ends[:, None] - truth.means[None], axis=2)
    weights = np.bincount(apart.argmin(1), minlength=len(truth.means)) / n * len(truth.means)
    some = slice(0, 8000)
    return Quality(
        energy_distance(ends[some], truth.sample(8000, 99)),
        float((apart.min(1) > 4 * truth.stds[0]).mean()),
        float(np.abs(weights - 1).max()),
    )
