"""What an evaluation compares: candidates, and one plan of prompts and seeds for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewstep.core.types import UserError
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
