"""The plan of a synthesis: all that its arrays depend on, written beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fewstep.core import json_io, schedule
from fewstep.core.atomic import write
from fewstep.core.types import Model, UserError

PLAN = "plan.json"
NULL = "null.npz"
LAYOUT = 1
"""Of the folder; counted up when readers of today could not read it."""


MOST_STEPS = 10_000
MOST_NUMBERS = 2**27
"""Of the arrays of one sample."""

Steps = Annotated[int, Meta(ge=1, le=MOST_STEPS)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
Width = Annotated[int, Meta(ge=1, le=2**20)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Same plan, same arrays: whatever the interruptions and the ranks, and within rounding the batch.

    Attributes:
        layout: :data:`LAYOUT`.
        teacher: its name.
        weights: fingerprint of its net's weights.
        text: fingerprint of its text encoders' weights.
        dtype: in which it computes.
        t5: whether T5's tokens are in the contexts.
        guidance: its guidance scale (``uncond + w (cond - uncond)``, or what a net with embedded guidance is
            told); ``None`` for a net that has none.
        steps: its Euler steps, on ``times.grid(steps, shift)``.
        student_steps: the student's steps, at whose grid's times the walk is kept; 0 keeps the latents alone.
        shift: time shift of both grids.
        seed: sample ``i`` starts from ``sample.noise(seed + i)``.
        number: how many samples.
        captions: digest of their captions in order.
        per_shard: samples a shard; the last one may have fewer.
        pictures: whether the pictures are there too.
        latent: shape of the latents, ``(C, H, W)``.
        context: shape of a caption's context, ``(L, D)``.
        pooled: length of its pooled vector; 0 for a family without.
        clip_length: the first rows of a context that make the condition without T5; ``None`` where T5 cannot
            be left out.
    """

    layout: int = LAYOUT
    teacher: str
    weights: str
    text: str
    dtype: str
    t5: bool
    guidance: Annotated[float, Meta(ge=-1e6, le=1e6)] | None
    steps: Steps
    student_steps: Annotated[int, Meta(ge=0, le=MOST_STEPS)]
    shift: Annotated[float, Meta(ge=1e-3, le=1e3)]
    seed: Annotated[int, Meta(ge=0)]
    number: Count
    captions: str
    per_shard: Count
    pictures: bool
    latent: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=3)]
    context: tuple[Width, Width]
    pooled: Annotated[int, Meta(ge=0, le=2**20)]
    clip_length: Annotated[int, Meta(ge=0, le=2**20)] | None

    @property
    def times(self) -> list[float]:
        """Of the states that are kept, descending to 0: ``student_steps + 1`` of them, or 0 alone."""
        return schedule.grid(self.student_steps, self.shift) if self.student_steps else [0.0]

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of a sample's ``states``, ``(S + 1, C, H, W)``, its ``context`` or its ``pooled``."""
        states = (self.student_steps + 1, *self.latent)
        return {"states": states, "context": self.context, "pooled": (self.pooled,)}[kind]

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.number // self.per_shard)

    def rows(self, shard: int) -> range:
        """The samples in a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.number))

    def path(self, folder: Path, shard: int) -> Path:
        """Where a shard lies."""
        return folder / f"synthetic-{shard:05d}.tar"


def make(
    teacher: Model,
    prompts: Sequence[str],
    *,
    guidance: float | None,
    steps: int,
    student_steps: int = 0,
    seed: int = 0,
    weights: str = "",
    text: str = "",
    dtype: str = "float32",
    clip_length: int | None = None,
    per_shard: int = 128,
    pictures: bool = False,
) -> Plan:
    """The plan to walk ``teacher`` for each of ``prompts``; what is not told follows from the teacher.

    Args:
        teacher: where its ``guidance`` is ``None``, it is distilled in: no second pass.
        prompts: a caption a sample.
        guidance: and those below: see :class:`Plan`.
        steps: a multiple of ``student_steps``.
        student_steps: 0 keeps no walks.
        seed: of the first sample.
        weights: as in :class:`Plan`.
        text: as in :class:`Plan`.
        dtype: as in :class:`Plan`.
        clip_length: as in :class:`Plan`.
        per_shard: what an interruption costs at most.
        pictures: decode the latents too.

    Raises:
        UserError: a number out of its range.
    """
    if not prompts:
        raise UserError("there is no caption to make samples of")
    if steps < 1 or per_shard < 1 or student_steps < 0:
        raise UserError("steps and per-shard must be at least 1")
    if student_steps and steps % student_steps:
        near = max(1, round(steps / student_steps)) * student_steps
        raise UserError(
            f"the teacher's {steps} steps do not divide into {student_steps} moves of the student; "
            f"take {near} steps"
        )
    if not 0 <= seed <= 2**64 - len(prompts):
        raise UserError(f"seeds lie between 0 and 2**64 - 1; {len(prompts)} from {seed} on do not")
    null = teacher.text([""])
    length, width = (int(n) for n in null.context.shape[1:])
    plan = Plan(
        teacher=teacher.name,
        weights=weights,
        text=text,
        dtype=dtype,
        t5=clip_length is None or length > clip_length,
        guidance=guidance,
        steps=steps,
        student_steps=student_steps,
        shift=float(teacher.shift),
        seed=seed,
        number=len(prompts),
        captions=digest(prompts),
        per_shard=per_shard,
        pictures=pictures,
        latent=tuple(teacher.latent),
        context=(length, width),
        pooled=int(null.pooled.shape[1]),
        clip_length=clip_length,
    )
    return _checked(json_io.convert(asdict(plan), Plan, "the plan"), "the plan")


def _checked(plan: Plan, where: str) -> Plan:
    """The plan, if its numbers fit together.

    Raises:
        UserError: they do not.
    """
    if plan.student_steps and plan.steps % plan.student_steps:
        raise UserError(f"{where} has {plan.steps} steps, which {plan.student_steps} do not divide")
    if plan.seed > 2**64 - plan.number:
        raise UserError(f"{where} has seeds from {plan.seed} on: they end at 2**64 - 1")
    if max(prod(plan.shape(kind)) for kind in ("states", "context", "pooled")) > MOST_NUMBERS:
        raise UserError(f"{where} has samples of more than {MOST_NUMBERS} numbers")
    return plan


def digest(prompts: Sequence[str]) -> str:
    """What tells these captions in this order from all others."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Layout:
    layout: int


def read(folder: Path) -> Plan:
    """The plan of a folder.

    Raises:
        UserError: there is none, or it is broken or of another layout.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"{folder} holds no {PLAN}; make samples there with: fewstep sample-teacher")
    try:
        told: dict[str, Any] = json_io.read(path, python=True)
        if (layout := json_io.convert(told, _Layout, str(path)).layout) != LAYOUT:
            raise UserError(f"{path} is of layout {layout}, which is not read here")
        if odd := sorted(told.keys() - {field.name for field in fields(Plan)}):
            raise UserError(f"{path} is broken: {odd[0][:40]} is no entry of a plan")
        return _checked(json_io.convert(told, Plan, str(path)), str(path))
    except UserError as error:
        raise UserError(f"{error}; delete the folder and make it again") from None


def claim(folder: Path, plan: Plan) -> Plan:
    """Write the plan into a folder, or make sure that it is the one there.

    The fingerprint of its weights tells a teacher from others, not its name: folders are renamed.

    Returns:
        The plan that is in the folder.

    Raises:
        UserError: the folder was made by another plan or by something else, or cannot be written.
    """
    others = [
        *folder.glob("synthetic-*.tar"),
        *folder.glob(NULL),
    ]  # before the plan, which another rank may write
    if not (folder / PLAN).exists():
        if others:
            raise UserError(
                f"{others[0]} was not made by fewstep sample-teacher (there is no {PLAN}); "
                "choose another folder"
            )
        write(folder / PLAN, (json.dumps(asdict(plan), indent=2) + "\n").encode())
        return plan
    before = read(folder)
    if plan.weights:
        plan = replace(plan, teacher=before.teacher)
    there, asked = asdict(before), asdict(plan)
    other = [f"{name} {there[name]} there, {asked[name]} now" for name in asked if there[name] != asked[name]]
    if other:
        raise UserError(f"{folder} was made by another plan ({'; '.join(other)}); choose another folder")
    return before
