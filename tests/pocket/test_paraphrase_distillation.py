"""Text encoders that learn new phrasings and keep what they said."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.methods.base import StepRandom
from fewstep.pocket import config as pocket
from fewstep.pocket.paraphrase_distillation import ParaphraseBatch, ParaphraseDistillation
from fewstep.pocket.text_encoder import ClipPair

pytestmark = pytest.mark.slow(5)

DRAW = StepRandom(np.random.default_rng(0), torch.Generator())


def ids(*prompts: str) -> torch.Tensor:
    return pocket.byte_tokenizer()(
        list(prompts), padding="max_length", max_length=pocket.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def clips() -> ClipPair:
    torch.manual_seed(0)
    tokenizer = pocket.byte_tokenizer()
    return ClipPair([pocket.clip(tokenizer, act) for act in ("quick_gelu", "gelu")])


def rephrase(before: ClipPair, kept: float = 1.0) -> ParaphraseDistillation:
    """All of a copy learns."""
    student = copy.deepcopy(before)
    return ParaphraseDistillation(
        student, student, before.requires_grad_(False), pocket.CELLS, lambda *said: said, kept
    )


def taught(
    method: ParaphraseDistillation, batch: ParaphraseBatch
) -> tuple[dict[str, float], dict[str, float]]:
    """The losses before thirty updates and after."""

    def now() -> dict[str, float]:
        return {name: float(loss.detach()) for name, loss in method.losses(batch, DRAW).items()}

    first, optimizer = now(), torch.optim.AdamW(method.trainable.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        total: Any = sum(method.losses(batch, DRAW).values())
        total.backward()
        optimizer.step()
    return first, now()


def test_who_says_the_same_has_nothing_to_learn_and_only_cells_of_a_phrase_count() -> None:
    method = rephrase(clips())
    same = ParaphraseBatch(ids("a dog", "a cat"), ids("a dog", "a cat"), 1)
    assert all(float(v.detach()) < 1e-6 for v in method.losses(same, DRAW).values())
    other = method.losses(ParaphraseBatch(ids("doggo", "a cat"), ids("a dog", "a cat"), 1), DRAW)
    assert float(other["phrase"].detach()) > 0.01 and float(other["caption"].detach()) < 1e-6


def test_captions_have_their_weight() -> None:
    before = clips()
    batch = ParaphraseBatch(ids("doggo", "a cat"), ids("a dog", "two books"), 1)
    once, thrice = (rephrase(before, kept).losses(batch, DRAW) for kept in (1.0, 3.0))
    for name, times in (("phrase", 1), ("caption", 3)):
        assert float(thrice[name].detach()) == pytest.approx(times * float(once[name].detach()), rel=1e-4)


def test_distance_counts_where_the_net_hears() -> None:
    before = clips()
    batch = ParaphraseBatch(ids("doggo", "a cat"), ids("a dog", "two books"), 1)
    deaf = dataclasses.replace(rephrase(before), project=lambda states, pooled: (0 * states + 1, pooled))
    with torch.no_grad():
        half = dataclasses.replace(rephrase(before), project=lambda s, pooled: (s[..., :192], pooled))
        whole = rephrase(before).losses(batch, DRAW)
        assert float(half.losses(batch, DRAW)["phrase"]) != pytest.approx(float(whole["phrase"]), rel=1e-4)
        assert not torch.isfinite(deaf.losses(batch, DRAW)["phrase"])  # nothing is heard: no distance


def test_a_new_phrase_is_learnt_and_an_old_caption_kept() -> None:
    before = clips()
    method = rephrase(before)
    batch = ParaphraseBatch(ids("doggo pls", "a cat"), ids("a dog", "a cat"), 1)
    method.trainable.requires_grad_(True)
    first, last = taught(method, batch)
    assert last["phrase"] < 0.3 * first["phrase"] and last["caption"] < 0.1
    assert all(p.grad is None for p in before.parameters())


def test_new_layers_change_nothing_until_they_learn_and_then_they_alone_do() -> None:
    before = clips()
    student = before.with_new_layers(2).requires_grad_(False)
    said = ids("a dog", "two red books on a table, flat style")
    for one, other in zip(before(said), student(said), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    learns = student.lowest_layers(2).requires_grad_(True)
    kept = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    assert {n.split(".")[5] for n in kept if ".layers." in n} == {"2", "3", "4", "5"}
    method = ParaphraseDistillation(
        learns, student, before.requires_grad_(False), pocket.CELLS, lambda *s: s, 3.0
    )
    batch = ParaphraseBatch(ids("doggo pls", "a cat"), ids("a dog", "a cat"), 1)
    first, last = taught(method, batch)
    assert last["phrase"] < 0.5 * first["phrase"] and last["caption"] < 0.5
    assert all(torch.equal(p, kept[n]) for n, p in student.named_parameters() if n in kept)
