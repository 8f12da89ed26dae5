"""The scene score as a group of prompts: its metric, its tables, and image grids with a verdict per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from PIL.Image import Image

from fewstep.core.stats import Interval
from fewstep.evaluate.metric import TRUTH, ImageBatch, Prompt
from fewstep.evaluate.prompt_set import Ceiling, Measured, PromptGroup, Table
from fewstep.images.grid import sheet
from fewstep.pocket.geneval import FIRST_SEED, REAL_LABEL, GenEvalTest, Verdict, compare, judge, measure
from fewstep.pocket.geneval_prompts import CATEGORIES, Scene

SHOWN = 10
"""Images of each category and half on a grid."""

COLUMNS = 10


class GenEvalScore:
    """``scene``, ``scene_seen``, ``scene_held_out`` and ``scene_CATEGORY``; ``scene_ratio`` to the teacher.

    Attributes:
        verdicts: on each image so far.
    """

    def __init__(self, test: GenEvalTest) -> None:
        self._test = test
        self._scenes: list[Scene] = []
        self.verdicts: list[Verdict] = []

    def update(self, images: ImageBatch, prompts: Sequence[Prompt]) -> None:
        """Judge the next images; the truth of a prompt is its `Scene`."""
        scenes = [prompt.truth for prompt in prompts]
        self.verdicts += judge(images.pixels, self._test, scenes)
        self._scenes += scenes

    def compute(self) -> Mapping[str, Interval]:
        return measure(self.verdicts, self._scenes).figures

    def compare(self, teacher: GenEvalScore) -> Mapping[str, Interval]:
        return compare(measure(self.verdicts, self._scenes), measure(teacher.verdicts, teacher._scenes))


@dataclass(frozen=True)
class GenEvalFactory:
    """Makes a `GenEvalScore` with the detector of ``test``."""

    test: GenEvalTest
    needs: frozenset[str] = frozenset({TRUTH})

    def __call__(self) -> GenEvalScore:
        return GenEvalScore(self.test)


def group(test: GenEvalTest) -> PromptGroup:
    """Return the scenes of ``test`` as a group of prompts, one image each."""
    table = Table(
        (
            ("all, %", "scene", 100),
            *((f"{name}, %", f"scene_{name}", 100) for name in CATEGORIES),
            ("seen, %", "scene_seen", 100),
            ("held out, %", "scene_held_out", 100),
            ("all, % of teacher", "scene_ratio", 100),
        ),
        f"Scene score, {len(test.scenes)} prompts with one image each, half of them held out, judged by "
        f"{test.detector}:",
    )
    return PromptGroup(
        [Prompt(scene.prompt, scene) for scene in test.scenes],
        name="scenes",
        metrics=(GenEvalFactory(test),),
        images_per_prompt=1,
        seed_offset=FIRST_SEED,
        ceilings=(Ceiling(REAL_LABEL, lambda: test.real, grid=True),),
        grid=partial(grid, test),
        tables=(table,),
    )


def grid(test: GenEvalTest, measured: Measured) -> Image:
    """Return the first images of each category and half, each with "ok" or what is wrong, and its prompt."""
    (metric,) = measured.metrics
    assert isinstance(metric, GenEvalScore)
    count: dict[tuple[str, bool], int] = {}
    shown: list[int] = []
    for index, scene in enumerate(test.scenes):
        cell = scene.category, scene.held_out
        count[cell] = count.get(cell, 0) + 1
        if count[cell] <= SHOWN:
            shown.append(index)
    verdicts = [metric.verdicts[index] for index in shown]
    labels = [
        f"{'ok' if verdict.right else 'NO, ' + verdict.reason}: {test.scenes[index].prompt}"
        for index, verdict in zip(shown, verdicts, strict=True)
    ]
    return sheet(measured.pixels[shown], labels, COLUMNS)
