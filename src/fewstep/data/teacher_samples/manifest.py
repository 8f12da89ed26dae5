"""The plan of a folder of teacher samples: everything that its arrays depend on."""

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
"""Version of the folder's layout; it goes up when older readers could not read a folder."""

MAX_STEPS = 10_000
MAX_VALUES = 2**27
"""Most values of an array of one sample."""

Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
Width = Annotated[int, Meta(ge=1, le=2**20)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the arrays depend on: equal plans give equal arrays.

    Interruptions and the number of processes do not matter, and the batch size only by rounding.

    Attributes:
        layout: :data:`LAYOUT`.
        teacher: name of the teacher.
        weights: fingerprint of its net's weights.
        text: fingerprint of its text encoders' weights.
        dtype: of the teacher's computation.
        t5: whether T5's tokens are in the contexts.
        guidance: its guidance scale ``w`` in ``uncond + w (cond - uncond)``, or the scale that a net with
            embedded guidance is given; ``None`` for a net without guidance.
        steps: its Euler steps, on :func:`fewstep.core.schedule.grid`.
        student_steps: steps of the student, at the times of whose grid the trajectory is kept; 0 keeps the
            latents alone.
        shift: time shift of both grids.
        seed: sample ``i`` starts from the noise of seed ``seed + i``.
        number: number of samples.
        captions: hash of their captions in order.
        per_shard: samples per shard; the last one may have fewer.
        pictures: whether the images are stored, too.
        latent: shape of the latents, ``(C, H, W)``.
        context: shape of a caption's token embeddings, ``(L, D)``.
        pooled: length of its pooled vector; 0 for a family without.
        clip_length: how many rows of the context come first and are the condition without T5; ``None`` if
            T5 cannot be left out.
    """

    layout: int = LAYOUT
    teacher: str
    weights: str
    text: str
    dtype: str
    t5: bool
    guidance: Annotated[float, Meta(ge=-1e6, le=1e6)] | None
    steps: Steps
    student_steps: Annotated[int, Meta(ge=0, le=MAX_STEPS)]
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
        """Times of the states that are kept, descending to 0: ``student_steps + 1`` of them, or 0 alone."""
        return schedule.grid(self.student_steps, self.shift) if self.student_steps else [0.0]

    def shape(self, kind: str) -> tuple[int, ...]:
        """Return the shape of a sample's ``states``, ``(S + 1, C, H, W)``, ``context`` or ``pooled``."""
        states = (self.student_steps + 1, *self.latent)
        return {"states": states, "context": self.context, "pooled": (self.pooled,)}[kind]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.number // self.per_shard)

    def rows(self, shard: int) -> range:
        """Return the rows of the samples in a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.number))

    def path(self, folder: Path, shard: int) -> Path:
        """Return the path of a shard."""
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
    """Return the plan to sample ``teacher`` for each of ``prompts``; shapes and shift are the teacher's.

    Args:
        teacher: without a second pass if its ``guidance`` is ``None``.
        prompts: one caption per sample.
        guidance: as in :class:`Plan`.
        steps: a multiple of ``student_steps``.
        student_steps: 0 keeps no trajectories.
        seed: of the first sample.
        weights: as in :class:`Plan`.
        text: as in :class:`Plan`.
        dtype: as in :class:`Plan`.
        clip_length: as in :class:`Plan`.
        per_shard: samples per shard; an interruption loses at most as many.
        pictures: store the decoded images, too.

    Raises:
        UserError: a number is out of its range.
    """
    if not prompts:
        raise UserError("there is no caption to make samples of")
    if steps < 1 or per_shard < 1 or student_steps < 0:
        raise UserError("steps and per-shard must be at least 1")
    if student_steps and steps % student_steps:
        nearest = max(1, round(steps / student_steps)) * student_steps
        raise UserError(
            f"the teacher's {steps} steps do not divide into {student_steps} steps of the student; "
            f"take {nearest} steps"
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
    """Return the plan, if its numbers fit together.

    Raises:
        UserError: they do not.
    """
    if plan.student_steps and plan.steps % plan.student_steps:
        raise UserError(f"{where} has {plan.steps} steps, which {plan.student_steps} do not divide")
    if plan.seed > 2**64 - plan.number:
        raise UserError(f"{where} has seeds from {plan.seed} on: they end at 2**64 - 1")
    if max(prod(plan.shape(kind)) for kind in ("states", "context", "pooled")) > MAX_VALUES:
        raise UserError(f"{where} has samples of more than {MAX_VALUES} values")
    return plan


def digest(prompts: Sequence[str]) -> str:
    """Return a hash of the captions in this order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Layout:
    layout: int


def read(folder: Path) -> Plan:
    """Read the plan of a folder.

    Raises:
        UserError: there is none, or it is broken or of another layout.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"{folder} holds no {PLAN}; make samples there with: fewstep sample-teacher")
    try:
        content: dict[str, Any] = json_io.read(path, python=True)
        if (layout := json_io.convert(content, _Layout, str(path)).layout) != LAYOUT:
            raise UserError(f"{path} is of layout {layout}, which is not read here")
        if unknown := sorted(content.keys() - {field.name for field in fields(Plan)}):
            raise UserError(f"{path} is broken: {unknown[0][:40]} is no entry of a plan")
        return _checked(json_io.convert(content, Plan, str(path)), str(path))
    except UserError as error:
        raise UserError(f"{error}; delete the folder and make it again") from None


def claim(folder: Path, plan: Plan) -> Plan:
    """Write the plan into a folder, or check that the folder has the same plan.

    A teacher is identified by the fingerprint of its weights, not by its name: folders are renamed.

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
