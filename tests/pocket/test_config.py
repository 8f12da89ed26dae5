"""Pocket is an SD3 of small configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fewstep.core import flow, losses, sampling
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.pocket import config as pocket

PROMPTS = ["a red apple, 3D style", "苹果 🍎"]


@pytest.fixture(scope="module")
def family() -> Family:
    return pocket.build()


def test_its_shapes(family: Family) -> None:
    assert (family.latent, family.downscale, family.shift) == ((16, 16, 16), 8, 3.0)
    assert len(family.blocks) == family.net.config.num_layers
    cond = family.text(PROMPTS)
    assert cond.context.shape == (2, 2 * pocket.LENGTH, 384)
    assert cond.pooled.shape == (2, 384)
    with torch.no_grad():
        large = torch.from_numpy(sampling.batch_noise([1, 2], (16, 32, 32)))  # 256 px
        assert family.velocity(large, torch.tensor([1.0, 0.5]), cond).shape == large.shape
        assert family.codec.decode(large).shape == (2, 3, 256, 256)


def test_a_seed_is_its_weights_and_leaves_the_global_state(family: Family) -> None:
    state = torch.get_rng_state()
    again, other = pocket.build(0), pocket.build(1)
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, same, theirs = (next(model.parts[part].parameters()) for model in (family, again, other))
        assert torch.equal(ours, same)
        assert not torch.equal(ours, theirs)


def test_own_codec_and_text_encoders_are_used(family: Family) -> None:
    codec = pocket.autoencoder()
    texts = (family.parts["text_encoder"], family.parts["text_encoder_2"], None)
    other = pocket.build(codec=codec, tokenizer=family.parts["tokenizer"], text_encoders=texts)
    assert other.parts["vae"] is codec
    assert torch.equal(other.text(PROMPTS).context, family.text(PROMPTS).context[:, : pocket.LENGTH])


def test_sd3_saves_and_loads_it(family: Family, tmp_path: Path) -> None:
    sd3.save(family, tmp_path / "pocket")
    again = sd3.load(tmp_path / "pocket")
    cond = family.text(PROMPTS)
    x, t = torch.from_numpy(sampling.batch_noise([1, 2], family.latent)), torch.tensor([0.9, 0.3])
    assert torch.equal(again.text(PROMPTS).context, cond.context)
    with torch.no_grad():
        assert torch.equal(again.velocity(x, t, cond), family.velocity(x, t, cond))


def test_bytes_reach_every_text() -> None:
    tokenizer = pocket.byte_tokenizer()
    for text in ("Red APPLE", "苹果 🍎", "naïve café"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.lower()
    assert len(tokenizer("x" * 10_000, truncation=True, max_length=pocket.LENGTH).input_ids) == pocket.LENGTH


def test_zero_gates_start_at_zero_and_learn() -> None:
    family = sd3.assemble(tiny.parts(), name="tiny")
    net: Any = family.net.requires_grad_(True)
    pocket.zero_gates(net)
    x0, noise = (torch.from_numpy(sampling.batch_noise(seeds, family.latent)) for seeds in ([1, 2], [3, 4]))
    t, cond = torch.tensor([0.9, 0.3]), family.text(PROMPTS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    history: list[float] = []
    for _ in range(30):
        v = family.velocity(flow.interpolate(x0, noise, t), t, cond)
        assert history or (v == 0).all()
        loss = losses.flow_matching(v, noise, x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]
