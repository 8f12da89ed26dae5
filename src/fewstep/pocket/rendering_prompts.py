"""The prompts of renderings: drawn from the stickers, measured against all renderings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from fewstep.core.stats import Interval
from fewstep.core.types import UserError
from fewstep.evaluate.metric import Prompt
from fewstep.evaluate.metric import Reference as RealImage
from fewstep.evaluate.metrics.diversity import Diversity
from fewstep.evaluate.metrics.kid import Kid
from fewstep.evaluate.metrics.kid_to_teacher import KidToTeacher
from fewstep.evaluate.metrics.retrieval import Retrieval
from fewstep.evaluate.prompt_set import Ceiling, Measured, PromptGroup, Table
from fewstep.images.grid import sheet
from fewstep.pocket.ceilings import Redraw
from fewstep.pocket.stickers import Reference

SEEN, HELD_OUT = "seen", "held_out"
GRID_PROMPTS = 12
GRID_SEEDS = 4

TABLES = (
    Table(
        (
            ("seen top-1, %", "seen_top1", 100),
            ("seen top-5, %", "seen_top5", 100),
            ("held-out top-1, %", "held_out_top1", 100),
            ("held-out top-5, %", "held_out_top5", 100),
            ("KID x1000", "kid", 1000),
            ("diversity", "diversity", 1),
        )
    ),
    Table(
        (
            ("seen top-1, %", "seen_pair_top1", 100),
            ("seen top-5, %", "seen_pair_top5", 100),
            ("held-out top-1, %", "held_out_pair_top1", 100),
            ("held-out top-5, %", "held_out_pair_top5", 100),
        ),
        "The right concept in the right style:",
    ),
    Table(
        (
            ("KID-T x1000", "kid_teacher", 1000),
            ("seen top-1, % of teacher", "seen_top1_ratio", 100),
            ("held-out top-1, % of teacher", "held_out_top1_ratio", 100),
            ("diversity, % of teacher", "diversity_ratio", 100),
        ),
        "Against the teacher:",
    ),
)


class ConceptRetrieval(Retrieval):
    """``{seen,held_out}_top{1,5}``: retrieval of the concept, in any style."""

    def label(self, truth: Reference) -> Hashable:
        """Return the concept of a rendering."""
        return truth.concept


class PairRetrieval(Retrieval):
    """``{seen,held_out}_pair_top{1,5}``: retrieval of the concept in the right style."""

    prefix = "pair_"

    def label(self, truth: Reference) -> Hashable:
        """Return the (concept, style) pair of a rendering."""
        return truth.concept, truth.style

    def compare(self, teacher: object) -> Mapping[str, Interval]:
        """Return no figures: ratios are of concepts only."""
        return {}


class HeldOutKid(Kid):
    """``kid``: images of held-out pairs against the renderings of all held-out pairs, grouped by concept."""

    split = HELD_OUT

    def group(self, truth: Reference) -> Hashable:
        """Return the concept of a rendering."""
        return truth.concept


class ConceptKidToTeacher(KidToTeacher):
    """``kid_teacher``, grouped by concept."""

    def group(self, truth: Reference) -> Hashable:
        """Return the concept of a rendering."""
        return truth.concept


METRICS = (ConceptRetrieval, PairRetrieval, Diversity, HeldOutKid, ConceptKidToTeacher)


def choose(references: Sequence[Reference], prompts: int) -> list[Reference]:
    """Draw ``prompts`` references without replacement, half seen and half held out, the same at every call.

    Where one half has too few, the other is not enlarged: the result may be shorter.

    Raises:
        UserError: no references, or fewer than 2 prompts.
    """
    if not references:
        raise UserError("there are no real renderings to evaluate against; run: fewstep data stickers")
    if prompts < 2:
        raise UserError(f"an evaluation needs at least 2 prompts, not {prompts}")
    rng = np.random.Generator(np.random.Philox(key=0))
    chosen: list[Reference] = []
    for held_out, share in ((False, prompts - prompts // 2), (True, prompts // 2)):
        pool = sorted((r for r in references if r.held_out == held_out), key=lambda r: (r.concept, r.style))
        chosen += [pool[i] for i in rng.permutation(len(pool))[:share]]
    return chosen


def group(
    chosen: Sequence[Reference], references: Sequence[Reference], ceilings: Mapping[str, Redraw]
) -> PromptGroup:
    """Return the prompts of ``chosen`` renderings as a group.

    Args:
        chosen: the renderings that the prompts ask for, seen ones before held-out ones.
        references: all renderings.
        ceilings: by label, what draws other renderings of the chosen pairs.
    """
    return PromptGroup(
        [Prompt(each.prompt, each, _split(each)) for each in chosen],
        references=[RealImage(each.image, each, _split(each)) for each in references],
        metrics=METRICS,
        ceilings=[Ceiling(label, partial(_redrawn, redraw, chosen)) for label, redraw in ceilings.items()],
        grid=grid,
        tables=TABLES,
    )


def grid(measured: Measured) -> Image:
    """Return the first prompts of either split, a row each: the real rendering, then some seeds."""
    seeds = measured.prompts.count(measured.prompts[0])
    prompts = measured.prompts[::seeds]
    splits = (
        [row for row, prompt in enumerate(prompts) if prompt.split == split] for split in (SEEN, HELD_OUT)
    )
    shown = min(seeds, GRID_SEEDS)
    height, width = measured.pixels.shape[2:]
    images: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    for row in [row for rows in splits for row in rows[: GRID_PROMPTS // 2]]:
        prompt, first = prompts[row], row * seeds
        images += [_resized(prompt.truth.image, height, width), *measured.pixels[first : first + shown]]
        labels += [f"real, {prompt.split.replace('_', ' ')}", prompt.text]
        labels += [f"seed {seed}" for seed in measured.seeds[first + 1 : first + shown]]
    return sheet(np.stack(images), labels, 1 + shown)


def _split(reference: Reference) -> str:
    return HELD_OUT if reference.held_out else SEEN


def _redrawn(redraw: Redraw, chosen: Sequence[Reference]) -> NDArray[np.uint8]:
    return np.stack([reference.image for reference in redraw(chosen)])


def _resized(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image as Pillow

    resized = Pillow.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((width, height))
    return np.asarray(resized).transpose(2, 0, 1)
