"""The scene score: does a picture hold what its prompt asked for, by GenEval's rules.

Ghosh, Hajishirzi and Schmidt, *GenEval* (arXiv 2310.11513), section 3 and their ``evaluate_images.py``: every
thing that the prompt names must be found, in counting exactly as many; then the colour must be right, or the
relation hold. A picture is right or wrong, nothing between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.core import stats
from fewstep.core.stats import Interval
from fewstep.pocket import render
from fewstep.pocket.detector import BoxDetector, Detection, Detector, ground
from fewstep.pocket.geneval_prompts import CATEGORIES, Scene, pictures, prompts
from fewstep.pocket.template_matching import Box, TemplateBank

FIRST_SEED = 1_000_000
"""Scenes' seeds start so much higher than those of the other prompts, so that no two prompts share one."""

NEAREST = 2
"""A thing may be a concept that is among so many likest ones, of all 1,355."""

ALIKE = 0.86
"""Likeness from which it then is; real scenes reach more. With both a person agrees oftenest."""

MARGIN = 0.1
"""Share of the two sides by which centres must be apart before a relation counts (GenEval's own)."""

REAL = "real scenes"
"""Label of the row that real pictures of the prompts make: what the detector allows at best."""

Find = Callable[[NDArray[np.uint8]], list[list[Detection]]]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and if not, the first thing that is wrong."""

    right: bool
    why: str = ""


@dataclass(frozen=True)
class GenEvalTest:
    """Prompts, what finds things in their pictures, and real pictures of them.

    Attributes:
        scenes: the prompts with their truth, ``[N]``.
        find: uint8 ``[N, 3, h, w]`` to the things in each picture.
        concepts: name -> place in a thing's likeness.
        detector: name of what finds.
        real: uint8 ``[N, 3, h, w]``, composed of renderings.
    """

    scenes: tuple[Scene, ...]
    find: Find
    concepts: dict[str, int]
    detector: str
    real: NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """Figures by name, and behind each one number per prompt, ``[P']``."""

    per_prompt: dict[str, NDArray[np.float64]]
    figures: dict[str, Interval]


def load(data: Path, detector: Path, many: int) -> GenEvalTest:
    """A test of ``many`` prompts on the renderings in ``data`` with the net in ``detector``.

    Raises:
        UserError: no renderings, no detector, or ``many`` is no multiple of 12.
    """
    renderings, finder = render.load(data, 128), BoxDetector(detector)
    scenes, found = prompts(renderings, many), Detector(finder, TemplateBank(renderings))
    return GenEvalTest(tuple(scenes), found, found.concepts, found.name, pictures(renderings, scenes))


def judge(
    images: NDArray[np.uint8], test: GenEvalTest, scenes: Sequence[Scene] | None = None
) -> list[Verdict]:
    """Return a verdict on each image.

    Args:
        images: uint8 ``[N, 3, h, w]``.
        test: finds the things in them.
        scenes: what each image should show, ``[N]``; those of the test when ``None``.
    """
    found = test.find(images)
    return [
        verdict(scene, things, test.concepts, image)
        for scene, things, image in zip(test.scenes if scenes is None else scenes, found, images, strict=True)
    ]


def verdict(
    scene: Scene, things: Sequence[Detection], concepts: dict[str, int], image: NDArray[np.uint8]
) -> Verdict:
    """One picture against its truth.

    Args:
        scene: what was asked for.
        things: what was found.
        concepts: name -> place in a thing's likeness.
        image: uint8 ``[3, h, w]``, for the background.
    """
    wanted = Counter(scene.things)
    shown = {name: _showing(things, concepts[name]) for name in wanted}
    for name, many in wanted.items():
        there = len(shown[name])
        if there < many or (scene.category == "counting" and there != many):
            return Verdict(False, f"{there} of {many} {name}")
    firsts = [shown[name][0] for name in wanted]
    if any(firsts[0] is other for other in firsts[1:]):
        return Verdict(False, "one thing for two")
    if scene.ground is not None and (colour := ground(image)) != scene.ground:
        return Verdict(False, f"on {colour}")
    if scene.relation is not None and scene.relation not in relations(*(thing.box for thing in firsts)):
        return Verdict(False, f"not {scene.relation}")
    return Verdict(True)


def relations(a: Box, b: Box) -> set[str]:
    """How ``a`` lies to ``b``; two relations may hold, or none (GenEval's ``relative_position``)."""
    reach = MARGIN * (a.side + b.side)
    across, down = (np.sign(d) * max(abs(d) - reach, 0.0) for d in (a.x - b.x, a.y - b.y))
    length = float(np.hypot(across, down))
    if length < 1e-3:
        return set()
    held = {
        "to the left of": -across,
        "to the right of": across,
        "above": -down,
        "below": down,
    }
    return {name for name, way in held.items() if way / length > 0.5}


def measure(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> Measured:
    """Share of right pictures: ``scene`` over all, ``scene_seen`` and ``scene_held_out``, and ``scene_NAME``
    of each category, ``[P']`` numbers of 0 or 1 a prompt behind each."""
    right = np.array([float(verdict.right) for verdict in verdicts])
    held_out = np.array([scene.held_out for scene in scenes])
    kind = np.array([scene.category for scene in scenes])
    masks = {"scene": np.ones(len(scenes), bool), "scene_seen": ~held_out, "scene_held_out": held_out}
    masks |= {f"scene_{category}": kind == category for category in CATEGORIES}
    per_prompt = {name: right[mask] for name, mask in masks.items() if mask.any()}
    return Measured(per_prompt, {name: stats.mean(values) for name, values in per_prompt.items()})


def against(student: Measured, teacher: Measured) -> dict[str, Interval]:
    """``scene_ratio``, the student's share of right pictures to the teacher's over the same prompts; nothing
    where the teacher has none right."""
    ratio = stats.ratio(student.per_prompt["scene"], teacher.per_prompt["scene"])
    return {} if ratio is None else {"scene_ratio": ratio}


def _showing(things: Sequence[Detection], place: int) -> list[Detection]:
    """Those that show a concept, the likest first."""
    likely = [thing for thing in things if thing.rank(place) < NEAREST and thing.likeness[place] >= ALIKE]
    return sorted(likely, key=lambda thing: -thing.likeness[place])
