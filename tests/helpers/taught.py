"""A tiny SD3 teacher on disk with its samples, for tests of what distils from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tiny
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.write import write_samples
from fewstep.families import sd3
from fewstep.families.common import fingerprint
from fewstep.pipeline.loading import load_family

PROMPTS = ["a cat", "a dog", "a red apple", "two pears", "the sun", "a boat"]


@dataclass(frozen=True)
class Taught:
    """A teacher's folder and its samples."""

    teacher: Path
    shards: Path


def make(root: Path) -> Taught:
    """Write both into ``root``: walks at the times of a student of four steps."""
    family = sd3.assemble(tiny.parts(), name="teacher", guidance=3.0)
    sd3.save(family, root / "teacher")
    loaded = load_family(str(root / "teacher"))
    plan = manifest.make(
        loaded, PROMPTS, guidance=3.0, steps=4, student_steps=4, weights=fingerprint(loaded.net),
        clip_length=loaded.clip_length,
    )  # fmt: skip
    write_samples(loaded.with_guidance(3.0), PROMPTS, plan, root / "walks")
    return Taught(root / "teacher", root / "walks")
