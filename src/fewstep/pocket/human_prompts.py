"""Prompts that people wrote: is an expected concept among the nearest ones?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from fewstep.core.types import UserError
from fewstep.evaluate.metric import Prompt
from fewstep.evaluate.metric import Reference as RealImage
from fewstep.evaluate.metrics.retrieval import DEPTHS
from fewstep.evaluate.prompt_set import Measured, PromptGroup, Table
from fewstep.images.grid import sheet
from fewstep.pocket.rendering_prompts import ConceptRetrieval
from fewstep.pocket.stickers import Reference

WRITTEN = "written"
COLUMNS = 12
SHOWN = 144
"""Images on a grid."""


@dataclass(frozen=True)
class HumanPrompt:
    """A prompt, and the concepts of which one is expected."""

    prompt: str
    concepts: tuple[str, ...]


def load(path: Path, references: Sequence[Reference]) -> tuple[HumanPrompt, ...]:
    """Read lines ``PROMPT<TAB>CONCEPT|CONCEPT``; empty ones and those that begin with ``#`` are skipped.

    Raises:
        UserError: the file cannot be read, a line has another form, or a concept has no rendering.
    """
    known = {reference.concept for reference in references}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    found: list[HumanPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt, tab, rest = line.partition("\t")
        concepts = tuple(rest.split("|"))
        if not tab or not prompt.strip():
            raise UserError(f"{path}, line {number}: give a prompt, a tab, and concepts with | between them")
        if unknown := [name for name in concepts if name not in known]:
            raise UserError(f"{path}, line {number}: there is no rendering of {unknown[0]!r}")
        found.append(HumanPrompt(prompt, concepts))
    if not found:
        raise UserError(f"{path} holds no prompts")
    return tuple(found)


class WrittenRetrieval(ConceptRetrieval):
    """``written_top{1,5}``: retrieval of any of the concepts that a prompt may mean."""

    def accepted(self, truth: HumanPrompt) -> Sequence[Hashable]:
        """Return the expected concepts of a prompt."""
        return truth.concepts


def group(written: Sequence[HumanPrompt], references: Sequence[RealImage]) -> PromptGroup:
    """Return the prompts as a group, one image each, retrieved among all renderings."""
    table = Table(
        (
            ("top-1, %", "written_top1", 100),
            ("top-5, %", "written_top5", 100),
            ("top-5, % of teacher", "written_top5_ratio", 100),
        ),
        f"{len(written)} prompts that people wrote, one image each; any concept that they mean counts:",
    )
    return PromptGroup(
        [Prompt(each.prompt, each, WRITTEN) for each in written],
        name=WRITTEN,
        references=references,
        metrics=(WrittenRetrieval,),
        images_per_prompt=1,
        grid=grid,
        tables=(table,),
    )


def grid(measured: Measured) -> Image:
    """Return the first images, each with whether its concept is among the five nearest, and its prompt."""
    (metric,) = measured.metrics
    assert isinstance(metric, WrittenRetrieval)
    labels = [
        f"{'ok' if found >= 0.5 else 'NO'}: {prompt.text}"
        for prompt, found in zip(measured.prompts, metric.found(DEPTHS[-1]), strict=True)
    ]
    return sheet(measured.pixels[:SHOWN], labels[:SHOWN], COLUMNS)
