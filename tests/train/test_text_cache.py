"""Captions are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewstep.core.types import Cond, UserError
from fewstep.train import text_cache

LINES = [f"a {word}" for word in ("cat", "dog", "pear")] * 100 + [""]


def text(prompts: Sequence[str]) -> Cond:
    lengths = torch.tensor([float(len(p)) for p in prompts])
    return Cond(lengths[:, None, None].expand(-1, 3, 4), lengths[:, None])


def refuse(prompts: Sequence[str]) -> Cond:
    raise AssertionError("encoded twice")


def test_each_caption_has_its_own_condition(tmp_path: Path) -> None:
    kept = text_cache.encode(text, "clip", LINES, tmp_path)
    cond = kept.on_device("cpu")([300, 2, 299])
    assert cond.context.shape == (3, 3, 4) and cond.context.dtype == torch.float32
    assert cond.pooled.flatten().tolist() == [0, 6, 6]
    assert len(kept) == len(LINES) > text_cache.BATCH


def test_they_are_read_the_second_time_and_by_no_other_encoder(tmp_path: Path) -> None:
    text_cache.encode(text, "clip", LINES, tmp_path)
    assert len(text_cache.encode(refuse, "clip", LINES, tmp_path)) == len(LINES)
    for mark, lines in (("another", LINES), ("clip", LINES[1:])):
        with pytest.raises(AssertionError):
            text_cache.encode(refuse, mark, lines, tmp_path)


def test_what_is_interrupted_is_not_kept_and_what_is_broken_is_named(tmp_path: Path) -> None:
    def stop(prompts: Sequence[str]) -> Cond:
        if "" in prompts:
            raise KeyboardInterrupt
        return text(prompts)

    with pytest.raises(KeyboardInterrupt):
        text_cache.encode(stop, "clip", LINES, tmp_path)
    assert not list(tmp_path.iterdir())
    text_cache.encode(text, "clip", LINES, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="are broken"):
        text_cache.encode(text, "clip", LINES, tmp_path)
