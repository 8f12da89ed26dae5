"""Text encoders that learn new phrasings and keep what they said."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.families import pocket
from fewstep.methods import Draw
from fewstep.methods.phrase import PhraseBatch, Rephrase
from fewstep.nets.text import Clips


def draw() -> Draw:
    return Draw(np.random.default_rng(0), torch.Generator().manual_seed(0))


DRAW = draw()


def ids(*prompts: str) -> torch.Tensor:
    return pocket.byte_tokenizer()(
        list(prompts), padding="max_length", max_length=pocket.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def clips() -> Clips:
    torch.manual_seed(0)
    tokenizer = pocket.byte_tokenizer()
    return Clips([pocket.clip(tokenizer, act) for act in ("quick_gelu", "gelu")])


def rephrase(before: Clips, kept: float = 1.0) -> Rephrase:
    """Through an MMDiT that reads: of random weights, with gates that are open."""
    family = pocket.build(0)
    net = family.net
    return Rephrase(
        copy.deepcopy(before).requires_grad_(True),
        before.requires_grad_(False),
        pocket.CELLS,
        heard=lambda states, pooled: (net.context_embedder(states), pooled),
        velocity=family.velocity,
        latent=family.latent,
        times=(1.0, 0.5),
        every=1,
        kept=kept,
    )


def test_who_says_the_same_has_nothing_to_learn_and_words_of_a_phrase_count_only_drawn() -> None:
    method = rephrase(clips())
    same = PhraseBatch(ids("a dog", "a cat"), ids("a dog", "a cat"), 1)
    assert all(float(v.detach()) < 1e-6 for v in method.losses(same, DRAW).values())
    other = method.losses(PhraseBatch(ids("doggo", "a cat"), ids("a dog", "a cat"), 1), DRAW)
    assert float(other["phrase"].detach()) > 0.01 and float(other["drawn_phrase"].detach()) > 1e-6
    assert float(other["caption"].detach()) < 1e-6 and float(other["drawn_caption"].detach()) < 1e-8


def test_captions_have_their_weight() -> None:
    before = clips()
    batch = PhraseBatch(ids("doggo", "a cat"), ids("a dog", "two books"), 1)
    once, thrice = (rephrase(before, kept).losses(batch, draw()) for kept in (1.0, 3.0))
    for name, times in (("phrase", 1), ("drawn_phrase", 1), ("caption", 3), ("drawn_caption", 3)):
        assert float(thrice[name].detach()) == pytest.approx(times * float(once[name].detach()), rel=1e-4)


def test_a_new_phrase_is_learnt_and_an_old_caption_kept() -> None:
    before = clips()
    method = rephrase(before, kept=3.0)
    batch = PhraseBatch(ids("doggo pls", "a cat"), ids("a dog", "a cat"), 1)
    optimizer = torch.optim.AdamW(method.student.parameters(), 1e-3)
    first = {name: float(loss.detach()) for name, loss in method.losses(batch, DRAW).items()}
    for _ in range(30):
        optimizer.zero_grad()
        total: Any = sum(method.losses(batch, DRAW).values())
        total.backward()
        optimizer.step()
    last = {name: float(loss.detach()) for name, loss in method.losses(batch, DRAW).items()}
    assert last["phrase"] < 0.3 * first["phrase"] and last["drawn_phrase"] < 0.7 * first["drawn_phrase"]
    assert last["caption"] < 0.3
    assert all(p.grad is None for p in before.parameters())
