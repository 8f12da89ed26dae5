"""What a teacher makes: its guided walks, kept at the times of a student's grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep import guide, sample, times
from fewstep.files import replacing_file, write
from fewstep.types import Model, UserError


@dataclass(frozen=True)
class Plan:
    """Which walks to make.

    Attributes:
        grid: the student's number of steps; states are kept at its grid's times.
        substeps: steps of the teacher between two of those times.
        guidance: the teacher's guidance scale.
        seed: walk ``i`` starts from the noise of seed ``seed + i``.
        weights: a fingerprint of the teacher's weights: walks of an earlier teacher are refused.
    """

    grid: int = 4
    substeps: int = 4
    guidance: float = 4.0
    seed: int = 0
    weights: str = ""


@dataclass(frozen=True)
class Kept:
    """States ``[N, grid + 1, C, H, W]`` float16 at ``times`` (descending, 1 to 0), and their prompts."""

    states: np.ndarray[Any, np.dtype[np.float16]]
    times: list[float]
    prompts: list[str]


def walks(
    teacher: Model,
    prompts: Sequence[str],
    plan: Plan,
    folder: Path,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Walk the guided teacher from noise for every prompt, a file a batch; what is there already is kept.

    Raises:
        UserError: the folder holds walks of another plan, or a file is broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, facts = folder / "plan.json", {"teacher": teacher.name, **vars(plan)}
    if note.exists() and json.loads(note.read_text()) != facts:
        raise UserError(f"{folder} holds walks of another plan or teacher; choose another folder")
    write(note, json.dumps(facts).encode())
    states: list[Any] = []
    for start in range(0, len(prompts), batch):
        lines = list(prompts[start : start + batch])
        told = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
        path = folder / f"walks-{start:06d}-{told}.npy"
        if not path.exists():
            with replacing_file(path) as fresh:
                np.save(fresh, _walk(teacher, lines, plan, start).astype(np.float16))
            progress(start + len(lines), len(prompts))
        try:
            states.append(np.load(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is broken ({error}); delete it and run again") from error
    return Kept(np.concatenate(states), times.grid(plan.grid, teacher.shift), list(prompts))


def _walk(teacher: Model, prompts: list[str], plan: Plan, start: int) -> np.ndarray[Any, Any]:
    fine = times.grid(plan.grid * plan.substeps, teacher.shift)
    seeds = range(plan.seed + start, plan.seed + start + len(prompts))
    x = teacher.lift(sample.noises(seeds, teacher.latent))
    cond = teacher.text(prompts)
    velocity = guide.Guided(teacher.velocity, teacher.text([""]), plan.guidance)
    kept = [teacher.lower(x)]
    for i in range(plan.grid):
        x = sample.walk(velocity, x, fine[i * plan.substeps : (i + 1) * plan.substeps + 1], cond)
        kept.append(teacher.lower(x))
    return np.stack(kept, axis=1)
