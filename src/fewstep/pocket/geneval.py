"""The scene score: whether an image shows what its prompt asks for, by GenEval's rules.

Ghosh, Hajishirzi and Schmidt, *GenEval* (arXiv 2310.11513), section 3 and their ``evaluate_images.py``. Every
object of the prompt must be found; in counting, exactly as many as named. Then the colour must be right, or
the relation must hold. An image is either right or wrong.
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
from fewstep.pocket.detector import BoxDetector, Detection, Detector, background_name
from fewstep.pocket.geneval_prompts import CATEGORIES, Scene, prompts, scene_images
from fewstep.pocket.template_matching import Box, TemplateBank

FIRST_SEED = 1_000_000
"""Offset of the scenes' seeds from those of the other prompts, so that no two prompts share one."""

TOP = 2
"""An object counts as a concept that is among so many most similar ones, of all 1,355."""

MIN_SIMILARITY = 0.86
"""Lowest similarity to that concept. With both values the score agrees best with a person."""

MARGIN = 0.1
"""Distance of two centres, as a share of the two sides, from which a relation counts (as in GenEval)."""

REAL_LABEL = "real scenes"
"""Label of the row of real images of the prompts, which shows what the detector allows at best."""

Detect = Callable[[NDArray[np.uint8]], list[list[Detection]]]


@dataclass(frozen=True)
class Verdict:
    """Whether an image is right, and if not, the first fault."""

    right: bool
    reason: str = ""


@dataclass(frozen=True)
class GenEvalTest:
    """Scene prompts, the detector that judges their images, and real images of them.

    Attributes:
        scenes: the prompts with their truth, ``[N]``.
        detect: uint8 ``[N, 3, h, w]`` to the objects in each image.
        concepts: name -> index in an object's similarity.
        detector: name of the detector.
        real: uint8 ``[N, 3, h, w]``, composed of renderings.
    """

    scenes: tuple[Scene, ...]
    detect: Detect
    concepts: dict[str, int]
    detector: str
    real: NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """Figures by name, and behind each one number per prompt, ``[P']``."""

    per_prompt: dict[str, NDArray[np.float64]]
    figures: dict[str, Interval]


def load(data: Path, detector: Path, count: int) -> GenEvalTest:
    """Return a test of ``count`` prompts on the renderings in ``data`` with the net in ``detector``.

    Raises:
        UserError: no renderings, no detector, or ``count`` is no multiple of 12.
    """
    renderings, boxes = render.load(data, 128), BoxDetector(detector)
    scenes, detect = prompts(renderings, count), Detector(boxes, TemplateBank(renderings))
    return GenEvalTest(tuple(scenes), detect, detect.concepts, detect.name, scene_images(renderings, scenes))


def judge(
    images: NDArray[np.uint8], test: GenEvalTest, scenes: Sequence[Scene] | None = None
) -> list[Verdict]:
    """Return a verdict on each image.

    Args:
        images: uint8 ``[N, 3, h, w]``.
        test: has the detector.
        scenes: what each image should show, ``[N]``; those of the test when ``None``.
    """
    found = test.detect(images)
    return [
        verdict(scene, objects, test.concepts, image)
        for scene, objects, image in zip(
            test.scenes if scenes is None else scenes, found, images, strict=True
        )
    ]


def verdict(
    scene: Scene, objects: Sequence[Detection], concepts: dict[str, int], image: NDArray[np.uint8]
) -> Verdict:
    """Return the verdict on one image.

    Args:
        scene: what the image should show.
        objects: what the detector found.
        concepts: name -> index in an object's similarity.
        image: uint8 ``[3, h, w]``, for the background.
    """
    wanted = Counter(scene.objects)
    shown = {name: _showing(objects, concepts[name]) for name in wanted}
    for name, count in wanted.items():
        found = len(shown[name])
        if found < count or (scene.category == "counting" and found != count):
            return Verdict(False, f"{found} of {count} {name}")
    firsts = [shown[name][0] for name in wanted]
    if any(firsts[0] is other for other in firsts[1:]):
        return Verdict(False, "one thing for two")
    if scene.background is not None and (colour := background_name(image)) != scene.background:
        return Verdict(False, f"on {colour}")
    if scene.relation is not None and scene.relation not in relations(*(each.box for each in firsts)):
        return Verdict(False, f"not {scene.relation}")
    return Verdict(True)


def relations(a: Box, b: Box) -> set[str]:
    """Return the relations of ``a`` to ``b``: none, one or two (GenEval's ``relative_position``)."""
    reach = MARGIN * (a.side + b.side)
    across, down = (np.sign(d) * max(abs(d) - reach, 0.0) for d in (a.x - b.x, a.y - b.y))
    length = float(np.hypot(across, down))
    if length < 1e-3:
        return set()
    along = {
        "to the left of": -across,
        "to the right of": across,
        "above": -down,
        "below": down,
    }
    return {name for name, distance in along.items() if distance / length > 0.5}


def measure(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> Measured:
    """Return the share of right images: ``scene`` over all, ``scene_seen``, ``scene_held_out``, and
    ``scene_NAME`` of each category. Behind each are ``[P']`` numbers, 0 or 1 per prompt."""
    right = np.array([float(verdict.right) for verdict in verdicts])
    held_out = np.array([scene.held_out for scene in scenes])
    categories = np.array([scene.category for scene in scenes])
    masks = {"scene": np.ones(len(scenes), bool), "scene_seen": ~held_out, "scene_held_out": held_out}
    masks |= {f"scene_{category}": categories == category for category in CATEGORIES}
    per_prompt = {name: right[mask] for name, mask in masks.items() if mask.any()}
    return Measured(per_prompt, {name: stats.mean(values) for name, values in per_prompt.items()})


def compare(student: Measured, teacher: Measured) -> dict[str, Interval]:
    """Return ``scene_ratio``, the student's share of right images over the teacher's on the same prompts;
    nothing where the teacher has none right."""
    ratio = stats.ratio(student.per_prompt["scene"], teacher.per_prompt["scene"])
    return {} if ratio is None else {"scene_ratio": ratio}


def _showing(objects: Sequence[Detection], concept: int) -> list[Detection]:
    """Return the objects that show a concept, the most similar first."""
    shown = [each for each in objects if each.rank(concept) < TOP]
    shown = [each for each in shown if each.similarity[concept] >= MIN_SIMILARITY]
    return sorted(shown, key=lambda each: -each.similarity[concept])
