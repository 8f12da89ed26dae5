"""The first student: trajectory guidance to a few steps."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.recipes.parts import SHOWN, Out, at_least_one
from fewstep.train import Options, Run
from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.data.synthesis.read import Synthetic
    from fewstep.families import Family


def distill_trajectory(
    *,
    teacher: Path = Path("models/pocket-teacher"),
    data: Path = Path("data/stickers"),
    out: Out = Path("runs/trajectory"),
    student_steps: int = 4,
    guidance: float = 4.0,
    substeps: int = 4,
    walks: int = 2000,
    synthetic: Path | None = None,
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
        walks: How many walks of the teacher to learn from; they are made first, and kept in the run folder.
        synthetic: Learn from the walks in this folder (of `fewstep synthesize --student-steps`) instead;
            --data, --guidance, --substeps and --walks then say nothing.
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

    from fewstep.families import sd3
    from fewstep.methods.trajectory import Trajectory, Walks
    from fewstep.recipes.parts import contact_sheet, encoded
    from fewstep.train.device import pick

    if threads:
        torch.set_num_threads(threads)
    lines = None if synthetic else _prompts(data, walks, seed)
    place = pick(device)
    family = sd3.load(teacher, t5=False, device=place)
    student = sd3.load(init or teacher, t5=False, device=place)
    if lines is not None:
        _walk(family, lines, out / "walks", guidance=guidance, substeps=substeps, seed=seed)
    made = _made(synthetic or out / "walks", family, student_steps)
    grid = torch.tensor(made.times[:: made.plan.student_steps // student_steps])

    def batches(step: int) -> Walks:
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        moves = rng.integers(0, student_steps, batch)
        read = made.read(made.rows(step, batch, seed))
        states: Any = read.states
        states, rows = states[:, :: made.plan.student_steps // student_steps], range(batch)
        return Walks(
            states[rows, moves],
            states[rows, moves + 1],
            grid[moves],
            grid[moves + 1],
            made.without_t5(read.cond),
        )

    def sheet(nets: dict[str, Any]) -> Any:
        return contact_sheet(family, nets["net"], SHOWN, steps=student_steps, guidance=None)

    def finish(nets: dict[str, Any]) -> None:
        parts = {**family.parts, "transformer": nets["net"]}
        sd3.save(sd3.assemble(parts, name="pocket", steps=student_steps, guidance=None), out / "model")

    about = {
        "recipe": "distill-trajectory",
        "teacher": str(teacher),
        "guidance": made.plan.guidance,
        "walks": len(made),
        "substeps": made.plan.steps // made.plan.student_steps,
        "student_steps": student_steps,
        "batch": batch,
        "init": str(init),
        "made_of": {"teacher": made.plan.weights},
    }
    method = Trajectory(student.net, student.velocity)
    patch = student.net.config.patch_size
    words = encoded(family, [""], False).context.shape[1]
    options = replace(options, tokens=family.latent[1] * family.latent[2] // patch**2 + words)
    return Run("trajectory", out, method, batches, options, about, sheet, finish)


def _prompts(data: Path, walks: int, seed: int) -> list[str]:
    from fewstep.data.texts import prompts_of
    from fewstep.recipes.parts import training_shards

    return prompts_of(training_shards(data), walks, seed)


def _walk(
    family: Family, prompts: list[str], folder: Path, *, guidance: float, substeps: int, seed: int
) -> None:
    """Make the walks of the run's own folder; those that are there already are kept."""
    from fewstep.data.synthesis import plan as plans
    from fewstep.data.synthesis.write import synthesize
    from fewstep.recipes.parts import fingerprint

    plan = plans.make(
        family,
        prompts,
        guidance=guidance,
        steps=4 * substeps,
        student_steps=4,
        seed=1_000_000 * (seed + 1),
        weights=fingerprint(family.net),
        clip_length=family.clip_length,
    )

    def progress(done: int, total: int) -> None:
        print(f"walks of the teacher {done}/{total}", file=sys.stderr)

    synthesize(family, prompts, plan, folder, progress=progress)


def _made(folder: Path, family: Family, student_steps: int) -> Synthetic:
    """The walks of a folder.

    Raises:
        UserError: they are of another teacher, or their times are not the student's.
    """
    from fewstep.data.synthesis.read import Synthetic
    from fewstep.recipes.parts import fingerprint

    made = Synthetic.open(folder)
    plan = made.plan
    # In half precision the fingerprint is of the rounded weights, and nothing can be said.
    other = plan.dtype == "float32" and plan.weights != fingerprint(family.net)
    if other or plan.latent != family.latent:
        raise UserError(f"{folder} holds walks of another teacher, {plan.teacher}: give it as --teacher")
    if plan.student_steps == 0 or plan.student_steps % student_steps:
        kept = f"walks at {plan.student_steps} steps" if plan.student_steps else "no walks, latents alone"
        raise UserError(
            f"{folder} holds {kept}, of no use to a student of {student_steps}: synthesize again with "
            f"--student-steps {student_steps}"
        )
    return made
