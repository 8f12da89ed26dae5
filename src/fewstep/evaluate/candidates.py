"""The models that an evaluation compares."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fewstep import __version__
from fewstep.core.types import UserError
from fewstep.data.folders import list_files
from fewstep.pipeline.loading import load
from fewstep.pipeline.pipeline import Pipeline
from fewstep.pipeline.resolve import parse_family, resolve

Draw = Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]]
"""Prompts and as many seeds -> uint8 ``[B, 3, h, w]``, one image per pair."""


@dataclass(frozen=True)
class Candidate:
    """One model at one setting.

    Attributes:
        label: its name in the tables; unique in a run.
        draw: generates its images.
        identity: everything that its images depend on besides prompt and seed (weights, steps, guidance).
            Cached images are used only if it is the same.
    """

    label: str
    draw: Draw
    identity: str


_SETTING = re.compile(r"(?P<name>.+?)(?:@(?P<steps>\d+)(?:x(?P<guidance>\d+(?:\.\d+)?))?)?/?")


@dataclass(frozen=True)
class Spec:
    """One model at one setting, as typed: ``NAME[@STEPS[xGUIDANCE]]``."""

    name: str
    steps: int | None = None
    guidance: float | None = None


def parse(text: str) -> Spec:
    """Return the parts of ``NAME[@STEPS[xGUIDANCE]]``.

    Raises:
        UserError: there is no name.
    """
    match = _SETTING.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} names no model: give NAME, NAME@STEPS or NAME@STEPSxGUIDANCE")
    steps, guidance = match["steps"], match["guidance"]
    return Spec(match["name"], int(steps) if steps else None, float(guidance) if guidance else None)


def candidate(spec: Spec) -> Candidate:
    """Return a model as a `Candidate`, checked by loading it once.

    Raises:
        UserError: there is no such model, or the setting is not for it.
    """
    request = _pipeline(spec.name).request("a", seed=0, steps=spec.steps, guidance=spec.guidance)
    guided = "" if request.guidance is None else f"x{request.guidance:g}"
    origin = [__version__, _weights(spec.name), request.steps, request.guidance]

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        pipe = _pipeline(spec.name)
        own = pipe.request(prompts, seed=0, steps=request.steps, guidance=request.guidance)
        # A request counts seeds up for each prompt; here every image has a seed of its own.
        jobs = tuple((text, seed) for (text, _), seed in zip(own.jobs, seeds, strict=True))
        images = [image for group in pipe.run(replace(own, jobs=jobs)) for image in group]
        return np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in images])

    return Candidate(f"{spec.name}@{request.steps}{guided}", draw, json.dumps(origin))


@lru_cache(maxsize=1)  # candidates run one after the other: no need to hold all models at once
def _pipeline(name: str) -> Pipeline:
    return load(name)


def _weights(name: str) -> str:
    """Return a digest of the names, sizes and times of a model's files; their contents may be gigabytes."""
    path = resolve(parse_family(name)[1])
    files = [file for file in list_files(path).files if file.is_file()] if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
