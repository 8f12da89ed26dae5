"""Text encoders that learn new phrasings and keep what they said."""

from __future__ import annotations

import copy

import numpy as np
import torch

from fewstep.families import pocket
from fewstep.methods import Draw
from fewstep.methods.phrase import PhraseBatch, Rephrase
from fewstep.nets.text import Clips

DRAW = Draw(np.random.default_rng(0), torch.Generator())


def ids(*prompts: str) -> torch.Tensor:
    return pocket.byte_tokenizer()(
        list(prompts), padding="max_length", max_length=pocket.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def clips() -> Clips:
    torch.manual_seed(0)
    tokenizer = pocket.byte_tokenizer()
    return Clips([pocket.clip(tokenizer, act) for act in ("quick_gelu", "gelu")])


def test_who_says_the_same_has_nothing_to_learn_and_only_cells_of_a_phrase_count() -> None:
    before = clips()
    method = Rephrase(copy.deepcopy(before), before, pocket.CELLS)
    same = PhraseBatch(ids("a dog", "a cat"), ids("a dog", "a cat"), 1)
    assert all(float(v.detach()) < 1e-6 for v in method.losses(same, DRAW).values())
    other = method.losses(PhraseBatch(ids("doggo", "a cat"), ids("a dog", "a cat"), 1), DRAW)
    assert float(other["phrase"].detach()) > 0.01 and float(other["caption"].detach()) < 1e-6


def test_a_new_phrase_is_learnt_and_an_old_caption_kept() -> None:
    before = clips()
    method = Rephrase(copy.deepcopy(before), before, pocket.CELLS)
    batch = PhraseBatch(ids("doggo pls", "a cat"), ids("a dog", "a cat"), 1)
    optimizer = torch.optim.AdamW(method.student.parameters(), 1e-3)
    first = float(method.losses(batch, DRAW)["phrase"].detach())
    for _ in range(30):
        optimizer.zero_grad()
        sum(method.losses(batch, DRAW).values()).backward()
        optimizer.step()
    last = method.losses(batch, DRAW)
    assert float(last["phrase"].detach()) < 0.3 * first and float(last["caption"].detach()) < 0.1
    assert all(p.grad is None for p in before.parameters())
