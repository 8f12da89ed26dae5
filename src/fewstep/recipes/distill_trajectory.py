"""The first student: trajectory guidance to a few steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.recipes.parts import SHOWN, Out, at_least_one
from fewstep.train import Options, Run
from fewstep.types import Share, UserError


def distill_trajectory(
    *,
    teacher: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    out: Out = Path("runs/trajectory"),
    student_steps: int = 4,
    guidance: float = 4.0,
    substeps: int = 4,
    walks: int = 2000,
    walks_folder: Path | None = None,
    init: Path | None = None,
    steps: int = 600,
    batch: int = 64,
    lr: float = 1e-4,
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
) -> Run:
    """Teach a student to make each move of the teacher's guided walk in one step.

    Args:
        teacher: The teacher, a diffusers folder or a hub name.
        data: The data set whose training captions are the prompts (a stickers folder, or shards).
        out: Run folder; the student is written to its subfolder `model` as a diffusers folder.
        student_steps: Steps that the student shall need: 4, 2 or 1.
        guidance: The teacher's guidance scale; the student then needs none.
        substeps: Steps of the teacher for each of four moves.
        walks: How many walks of the teacher to learn from; they are made first, and kept.
        walks_folder: Where the walks are kept; by default in the run folder.
        init: Start the student from this model instead of from the teacher.
        steps: Updates in all.
        batch: Moves an update.
        lr: Learning rate.
        seed: Of the data order and of the walks' noise.
        device: auto, cpu or cuda.
        threads: Torch threads; 0 leaves torch's choice.
    """
    options = Options(
        steps, lr, warmup=50, decay=0.5, seed=seed, device=device, threads=threads, ema=0.99, sheet_every=200
    )
    at_least_one(batch=batch, walks=walks, substeps=substeps)
    if student_steps not in (1, 2, 4):
        raise UserError(f"--student-steps must be 1, 2 or 4, not {student_steps}")

    import torch

    from fewstep.data import synthesis
    from fewstep.data.texts import prompts_of
    from fewstep.families import sd3
    from fewstep.methods.trajectory import Trajectory, Walks
    from fewstep.recipes.parts import contact_sheet, encoded, fingerprint, training_shards
    from fewstep.train.device import pick

    if threads:
        torch.set_num_threads(threads)
    sources, place = training_shards(data), pick(device)
    family = sd3.load(teacher, t5=False, device=place)
    student = sd3.load(init or teacher, t5=False, device=place)
    lines = prompts_of(sources, walks, seed)
    plan = synthesis.Plan(4, substeps, guidance, 1_000_000 * (seed + 1), fingerprint(family.net))
    made = synthesis.walks(family, lines, plan, walks_folder or out / "walks", 32, _progress())
    stride = 4 // student_steps
    states, grid = made.states[:, ::stride], made.times[::stride]

    def batches(step: int, share: Share) -> Walks:
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        rows = rng.integers(0, len(states), batch)[share.cut(batch)]
        moves = rng.integers(0, student_steps, batch)[share.cut(batch)]
        t = torch.tensor(grid)
        return Walks(
            torch.from_numpy(states[rows, moves].astype(np.float32)),
            torch.from_numpy(states[rows, moves + 1].astype(np.float32)),
            t[moves],
            t[moves + 1],
            encoded(family, [lines[r] for r in rows], False),
        )

    def sheet(nets: dict[str, Any]) -> Any:
        return contact_sheet(family, nets["net"], SHOWN, steps=student_steps, guidance=None)

    def finish(nets: dict[str, Any]) -> None:
        parts = {**family.parts, "transformer": nets["net"]}
        sd3.save(sd3.assemble(parts, name="pocket", steps=student_steps, guidance=None), out / "model")

    about = {
        "recipe": "distill-trajectory",
        "teacher": str(teacher),
        "guidance": guidance,
        "walks": walks,
        "substeps": substeps,
        "student_steps": student_steps,
        "batch": batch,
        "init": str(init),
        "made_of": {"teacher": fingerprint(family.net)},
    }
    method = Trajectory(student.net, student.velocity)
    patch = student.net.config.patch_size
    words = encoded(family, [""], False).context.shape[1]
    options = replace(options, tokens=family.latent[1] * family.latent[2] // patch**2 + words)
    return Run("trajectory", out, method, batches, options, about, sheet=sheet, finish=finish)


def _progress() -> Callable[[int, int], None]:
    return lambda done, total: print(f"walks of the teacher {done}/{total}", file=sys.stderr)
