"""How Pocket's text encoders learn, the picture that they foretell above all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fewstep.methods.base import StepRandom
from fewstep.pocket import config as pocket
from fewstep.pocket.text_distillation import LATENT_WEIGHT, TextBatch, TextEncoderDistillation
from fewstep.pocket.text_encoder import TextEncodersWithHeads, patchify, unpatchify

pytestmark = pytest.mark.slow(5)

DRAW = StepRandom(np.random.default_rng(0), torch.Generator())


def test_cells_are_the_pictures_parts_in_reading_order() -> None:
    x = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    cut = patchify(x, 4)
    assert cut.shape == (3, 16, 256)
    assert torch.equal(cut[:, 6], x[:, :, 4:8, 8:12].reshape(3, -1))  # second row, third cell
    assert torch.equal(unpatchify(cut, 16), x)


def learner() -> TextEncodersWithHeads:
    tokenizer = pocket.byte_tokenizer()
    clips = [pocket.clip(tokenizer, "quick_gelu"), pocket.clip(tokenizer, "gelu")]
    return TextEncodersWithHeads(clips, pocket.t5(tokenizer), 8, 5, pocket.CELLS, 4)


def batch(drawn: list[float]) -> TextBatch:
    ids = pocket.byte_tokenizer()(
        [f"thing {i}" for i in range(len(drawn))],
        padding="max_length",
        max_length=pocket.LENGTH,
        return_tensors="pt",
    ).input_ids
    many = len(drawn)
    rng = torch.Generator().manual_seed(1)
    return TextBatch(
        [ids, ids, ids[:1]],
        torch.nn.functional.normalize(torch.randn(many, 8, generator=rng)),
        torch.zeros(many, 5),
        torch.ones(many),
        torch.randn(many, pocket.CELLS, 4, generator=rng),
        torch.tensor(drawn),
    )


def test_a_caption_without_a_picture_foretells_nothing() -> None:
    student, asked = learner(), batch([1.0, 0.0])
    off = TextEncoderDistillation(student).losses(asked, DRAW)["picture"]
    expected = ((student(asked.ids)[1][0] - asked.latents[0]) ** 2).mean()
    torch.testing.assert_close(off, LATENT_WEIGHT * expected)


def test_the_cells_have_read_the_whole_prompt() -> None:
    """Also its last word, and each CLIP has its say in them."""
    student = learner().eval()
    one, other = batch([1.0, 1.0]), batch([1.0, 1.0])
    last = (one.ids[0][0] == one.ids[0][0, -1]).nonzero()[0].item() - 1
    for encoder in (0, 1):
        ids = [rows.clone() for rows in other.ids]
        ids[encoder][0, last] += 1
        with torch.no_grad():
            changed = (student(ids)[1] - student(one.ids)[1]).abs().amax(2)
        assert (changed[0] > 0).all() and (changed[1] == 0).all()


def test_the_clips_learn_the_mean_of_what_a_caption_may_mean() -> None:
    """Two pictures of one caption: the least squared error is half-way."""
    torch.manual_seed(0)
    student: Any = learner()
    asked = batch([1.0, 1.0])
    asked.ids[0][1] = asked.ids[0][0]
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(80):
        loss = TextEncoderDistillation(student).losses(asked, DRAW)["picture"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = asked.latents.mean(0)
    assert ((student(asked.ids)[1][0] - expected) ** 2).mean() < 0.05 * (expected**2).mean()
