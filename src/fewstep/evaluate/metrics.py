"""From features to figures: every measure of one candidate, and of a candidate against its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.core import stats
from fewstep.core.stats import Interval
from fewstep.evaluate.diversity import diversity
from fewstep.evaluate.kid import kid
from fewstep.evaluate.retrieval import topk_accuracy
from fewstep.pocket.stickers import Reference

Figures = dict[str, Interval]
PARTS = (("seen", False), ("held_out", True))
DEPTHS = (1, 5)
FEWEST = 3
"""Concepts below which a set has no KID."""


@dataclass(frozen=True)
class Measured:
    """One number a prompt for each measure that is a mean over prompts, ``[P']``, and the figures so far."""

    per_prompt: dict[str, NDArray[np.float64]]
    figures: Figures


def measure(
    features: NDArray[np.float32],
    chosen: Sequence[Reference],
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
) -> Measured:
    """Retrieval, diversity and KID of one candidate.

    Args:
        features: of its pictures, ``[P, S, d]``; with one seed there is no diversity.
        chosen: what each prompt asked for, ``[P]``.
        gallery: features of the reference renderings, ``[M, d]``.
        references: the renderings, ``[M]``.

    Returns:
        ``{seen,held_out}_top{1,5}`` and ``{seen,held_out}_pair_top{1,5}`` in [0, 1], ``diversity``, and
        ``kid``: the pictures of held-out pairs against the renderings of all held-out pairs.
    """
    per_prompt = _retrieval(features, chosen, gallery, references)
    if features.shape[1] > 1:
        per_prompt["diversity"] = diversity(features)
    figures = {name: stats.mean(values) for name, values in per_prompt.items()}
    figures |= _held_out_kid(features, chosen, gallery, references)
    return Measured(per_prompt, figures)


def compare_to_teacher(
    student: Measured,
    teacher: Measured,
    features: NDArray[np.float32],
    teachers: NDArray[np.float32],
    chosen: Sequence[Reference],
) -> Figures:
    """Ratios to the teacher, paired over prompts, and ``kid_teacher``, the KID to its pictures.

    Both sets of features are ``[P, S, d]`` over the same prompts ``[P]`` and seeds. A ratio whose
    denominator is zero is left out.
    """
    figures: Figures = {}
    for name in ("seen_top1", "seen_top5", "held_out_top1", "held_out_top5", "diversity"):
        if name in student.per_prompt and name in teacher.per_prompt:
            ratio = stats.ratio(student.per_prompt[name], teacher.per_prompt[name])
            figures |= {} if ratio is None else {f"{name}_ratio": ratio}
    groups = _concepts(chosen, features.shape[1])
    if len(set(groups)) >= FEWEST:
        figures["kid_teacher"] = kid(_flat(features), _flat(teachers), groups, groups)
    return figures


def _retrieval(
    features: NDArray[np.float32],
    chosen: Sequence[Reference],
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
) -> dict[str, NDArray[np.float64]]:
    seeds = features.shape[1]
    found: dict[str, NDArray[np.float64]] = {}
    held_out = np.array([reference.held_out for reference in chosen])
    kinds = (
        ("", [reference.concept for reference in chosen], [reference.concept for reference in references]),
        ("pair_", [_pair(reference) for reference in chosen], [_pair(reference) for reference in references]),
    )
    for kind, wanted, labels in kinds:
        asked = [label for label in wanted for _ in range(seeds)]
        for k in DEPTHS:
            rate = topk_accuracy(_flat(features), asked, gallery, labels, k).reshape(-1, seeds).mean(1)
            for part, value in PARTS:
                if np.any(held_out == value):
                    found[f"{part}_{kind}top{k}"] = rate[held_out == value]
    return found


def _held_out_kid(
    features: NDArray[np.float32],
    chosen: Sequence[Reference],
    gallery: NDArray[np.float32],
    references: Sequence[Reference],
) -> Figures:
    mine = [i for i, reference in enumerate(chosen) if reference.held_out]
    real = [i for i, reference in enumerate(references) if reference.held_out]
    groups = _concepts([chosen[i] for i in mine], features.shape[1])
    others = [references[i].concept for i in real]
    if min(len(set(groups)), len(set(others))) < FEWEST:
        return {}
    return {"kid": kid(_flat(features[mine]), gallery[real], groups, others)}


def _pair(reference: Reference) -> tuple[str, str]:
    return reference.concept, reference.style


def _concepts(chosen: Sequence[Reference], seeds: int) -> list[str]:
    return [reference.concept for reference in chosen for _ in range(seeds)]


def _flat(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features.reshape(-1, features.shape[-1])
