"""What an evaluation compares: candidates, and one plan of prompts and seeds for all of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

import fewstep
from fewstep.core.types import UserError
from fewstep.data.folders import list_files
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.resolve import parse_family, resolve
from fewstep.pocket.stickers import Reference

Draw = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]
"""Prompts and as many seeds -> uint8 ``[B, 3, h, w]``, one picture a pair."""


MOST_SEEDS = 1000
LAST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Candidate:
    """One model at one setting.

    Attributes:
        label: what the tables call it; unique in a run.
        draw: makes its pictures.
        identity: everything its pictures depend on besides prompt and seed (weights, steps, guidance);
            pictures kept from an earlier run are used again only if it is the same.
    """

    label: str
    draw: Draw
    identity: str


@dataclass(frozen=True)
class Plan:
    """The prompts of a run, seen pairs before held-out ones, and ``seeds`` pictures of each.

    Every picture has a seed of its own, the same for every candidate. So candidates are compared on the same
    noise, while two pictures of different prompts never share any.
    """

    chosen: tuple[Reference, ...]
    seeds: int
    first_seed: int

    def rows(self) -> tuple[list[str], list[int]]:
        """Prompt and seed of every picture, prompts outermost: ``[P * S]`` each."""
        prompts = [reference.prompt for reference in self.chosen for _ in range(self.seeds)]
        return prompts, [self.first_seed + row for row in range(len(prompts))]


def check_seeds(prompts: int, seeds: int, first_seed: int) -> None:
    """Refuse counts that allow no measurement.

    Raises:
        UserError: one does not.
    """
    if prompts < 2:
        raise UserError(f"an evaluation needs at least 2 prompts, not {prompts}")
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"seeds must be a whole number from 1 to {MOST_SEEDS}, not {seeds}")
    if not 0 <= first_seed <= LAST_SEED - prompts * seeds:
        raise UserError(f"the seeds of all pictures must lie from 0 to {LAST_SEED}, not from {first_seed}")


def choose(references: Sequence[Reference], prompts: int, seeds: int, first_seed: int = 0) -> Plan:
    """Draw ``prompts`` references without replacement, half seen and half held out, the same at every call.

    Where one half has too few, the other is not enlarged: a figure's count stays what was asked for or less.

    Raises:
        UserError: no references, or counts that allow no measurement.
    """
    if not references:
        raise UserError("there are no real renderings to evaluate against; run: fewstep data stickers")
    check_seeds(prompts, seeds, first_seed)
    rng = np.random.Generator(np.random.Philox(key=0))
    chosen: list[Reference] = []
    for held_out, share in ((False, prompts - prompts // 2), (True, prompts // 2)):
        pool = sorted((r for r in references if r.held_out == held_out), key=lambda r: (r.concept, r.style))
        chosen += [pool[i] for i in rng.permutation(len(pool))[:share]]
    return Plan(tuple(chosen), seeds, first_seed)


_SETTING = re.compile(r"(?P<name>.+?)(?:@(?P<steps>\d+)(?:x(?P<guidance>\d+(?:\.\d+)?))?)?/?")


@dataclass(frozen=True)
class Spec:
    """One model at one setting, as typed: ``NAME[@STEPS[xGUIDANCE]]``."""

    name: str
    steps: int | None = None
    guidance: float | None = None


def parse(text: str) -> Spec:
    """``NAME[@STEPS[xGUIDANCE]]`` in its parts.

    Raises:
        UserError: there is no name.
    """
    match = _SETTING.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} names no model: give NAME, NAME@STEPS or NAME@STEPSxGUIDANCE")
    steps, guidance = match["steps"], match["guidance"]
    return Spec(match["name"], int(steps) if steps else None, float(guidance) if guidance else None)


def candidate(spec: Spec) -> Candidate:
    """A `Candidate` of a model, checked by loading it once.

    Raises:
        UserError: there is no such model, or the setting is not for it.
    """
    request = _pipeline(spec.name).request("a", seed=0, steps=spec.steps, guidance=spec.guidance)
    guided = "" if request.guidance is None else f"x{request.guidance:g}"
    origin = [fewstep.__version__, _weights(spec.name), request.steps, request.guidance]

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        pipe = _pipeline(spec.name)
        asked = pipe.request(prompts, seed=0, steps=request.steps, guidance=request.guidance)
        # A request counts seeds up for each prompt; here every picture has a seed of its own.
        jobs = tuple((text, seed) for (text, _), seed in zip(asked.jobs, seeds, strict=True))
        pictures = [picture for group in pipe.run(replace(asked, jobs=jobs)) for picture in group]
        return np.stack([np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture in pictures])

    return Candidate(f"{spec.name}@{request.steps}{guided}", draw, json.dumps(origin))


@lru_cache(maxsize=1)  # candidates come one after the other: no need to hold all models at once
def _pipeline(name: str) -> Pipeline:
    return fewstep.load(name)


def _weights(name: str) -> str:
    """A digest of the names, sizes and times of a model's files; their contents may be gigabytes."""
    place = resolve(parse_family(name)[1])
    files = [path for path in list_files(place).files if path.is_file()] if place.is_dir() else [place]
    stats = [(str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
