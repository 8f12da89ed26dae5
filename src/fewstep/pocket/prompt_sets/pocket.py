"""Pocket's prompt set: renderings of the stickers, scenes, and prompts that people wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.core.types import UserError
from fewstep.evaluate.prompt_set import PromptGroup, PromptSet
from fewstep.pocket import geneval, geneval_run, render, rendering_prompts, stickers
from fewstep.pocket.assemble import check_counts
from fewstep.pocket.ceilings import Redraw, ceiling_sources
from fewstep.pocket.detector import check as check_detector
from fewstep.pocket.geneval import GenEvalTest
from fewstep.pocket.geneval_prompts import prompts as scene_prompts
from fewstep.pocket.human_prompts import HumanPrompt
from fewstep.pocket.human_prompts import group as written_group
from fewstep.pocket.human_prompts import load as load_written
from fewstep.pocket.stickers import Reference


def load(
    *,
    prompts: int = 200,
    scenes: int = 120,
    detector: Path = Path("models/scene-detector"),
    human_prompts: Path | None = None,
    data: Path = Path("data/stickers"),
) -> PromptSet:
    """Return the prompt set of the stickers in a folder.

    Args:
        prompts: number of prompts of renderings, half of them of held-out pairs.
        scenes: number of scene prompts: a multiple of 12, or 0.
        detector: folder of the scene detector.
        human_prompts: file of prompts that people wrote.
        data: folder that ``fewstep data stickers`` filled. It keeps the features of its renderings, too.

    Raises:
        UserError: numbers that allow no measurement, or a file or folder without what it should hold.
    """
    check_counts(prompts, scenes)
    rendered = render.load(data, 128)
    if scenes:
        check_detector(detector)
        scene_prompts(rendered, scenes)
    if human_prompts and not human_prompts.is_file():
        raise UserError(f"--human-prompts {human_prompts}: no such file")
    references = stickers.references(data)
    return build(
        references,
        prompts,
        ceilings=ceiling_sources(data),
        scenes=geneval.load(data, detector, scenes) if scenes else None,
        written=load_written(human_prompts, references) if human_prompts else (),
        cache=data / "features",
    )


PROMPT_SET = load


def build(
    references: Sequence[Reference],
    prompts: int,
    *,
    ceilings: Mapping[str, Redraw] | None = None,
    scenes: GenEvalTest | None = None,
    written: Sequence[HumanPrompt] = (),
    cache: Path | None = None,
) -> PromptSet:
    """Return a prompt set of given parts.

    Args:
        references: all renderings, of one size; the prompts are drawn from them.
        prompts: number of prompts, half from seen and half from held-out pairs.
        ceilings: by label, what draws other renderings of the same pairs.
        scenes: scene prompts.
        written: prompts that people wrote.
        cache: folder that keeps the features of the renderings.

    Raises:
        UserError: no references, or fewer than 2 prompts.
    """
    chosen = rendering_prompts.choose(references, prompts)
    groups: list[PromptGroup] = [rendering_prompts.group(chosen, references, ceilings or {})]
    if scenes is not None:
        groups.append(geneval_run.group(scenes))
    if written:
        groups.append(written_group(written, groups[0].references))
    held_out = sum(reference.held_out for reference in chosen)
    concepts = len({reference.concept for reference in references})
    return PromptSet(
        "pocket",
        groups,
        description=f"{len(chosen) - held_out} prompts are of seen and {held_out} of held-out pairs. "
        f"Retrieval is among {len(references)} renderings of {concepts} concepts.",
        facts={
            "seen": len(chosen) - held_out,
            "held_out": held_out,
            "scenes": 0 if scenes is None else len(scenes.scenes),
            "written": len(written),
            "detector": None if scenes is None else scenes.detector,
            "references": len(references),
            "concepts": concepts,
        },
        cache=cache,
    )
