"""Discriminator heads: where they look, and what a reset leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.core.types import UserError
from fewstep.modules.discriminator import DiscriminatorHeads

SIZE, PATCH = (8, 12), 2
ROWS, COLUMNS = 4, 6


def heads(kind: Any = "conv", taps: int = 1) -> DiscriminatorHeads:
    return DiscriminatorHeads([5] * taps, hidden=8, kind=kind, patch=PATCH)


def tokens(seed: int = 0, count: int = ROWS * COLUMNS) -> torch.Tensor:
    return torch.randn(2, count, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["token", "conv"])
def test_every_head_judges_every_place(kind: str) -> None:
    assert heads(kind, 3)([tokens(0), tokens(1), tokens(2)], SIZE).shape == (2, 3 * ROWS * COLUMNS)


def test_a_place_is_judged_with_its_eight_neighbours() -> None:
    one = tokens()
    other = one.clone()
    row, column = 1, 3
    other[:, row * COLUMNS + column] = tokens(1)[:, 0]
    judged = heads()
    changed = (judged([one], SIZE) != judged([other], SIZE)).any(0).view(ROWS, COLUMNS).nonzero().tolist()
    assert changed == [[r, c] for r in (0, 1, 2) for c in (2, 3, 4)]


def test_a_shifted_image_has_shifted_judgements_away_from_its_border() -> None:
    grid = tokens().view(2, ROWS, COLUMNS, 5)
    judged = heads()
    one, other = (
        judged([x.reshape(2, -1, 5)], SIZE).view(2, ROWS, COLUMNS) for x in (grid, grid.roll((1, 1), (1, 2)))
    )
    # At the border a place sees nothing beyond it, or, after the shift, the other side.
    assert torch.allclose(other[:, 2:-1, 2:-1], one[:, 1:-2, 1:-2], atol=1e-6)


def test_tokens_of_a_text_before_the_image_are_not_judged() -> None:
    image, judged = tokens(), heads()
    both = torch.cat([tokens(7, 3), image], 1)
    assert torch.equal(judged([both], SIZE), judged([image], SIZE))


@pytest.mark.parametrize(("count", "size"), [(ROWS * COLUMNS - 1, SIZE), (1, ()), (24, (9, 12))])
def test_tokens_that_are_no_grid_are_refused(count: int, size: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="give --heads token") as caught:
        heads()([tokens(0, count)], size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["token", "conv"])
def test_a_reset_head_forgets_and_the_others_do_not(kind: str) -> None:
    fresh, taught = heads(kind, 2), heads(kind, 2)
    with torch.no_grad():
        for parameter in taught.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        kept = [p.clone() for p in taught.heads[0].parameters()]
        for one in (fresh, taught):
            reset = one.reset_head(1, torch.Generator().manual_seed(5))
            assert {id(p) for p in reset} == {id(p) for p in one.heads[1].parameters()}
    pairs = zip(fresh.heads[1].parameters(), taught.heads[1].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert all(torch.equal(p, q) for p, q in zip(kept, taught.heads[0].parameters(), strict=True))


@pytest.mark.parametrize("kind", ["token", "conv"])
def test_new_heads_judge_unit_features_by_numbers_of_unit_size(kind: str) -> None:
    judged = DiscriminatorHeads([64], kind=kind)([torch.randn(8, 256, 64)], (16, 16))  # type: ignore[arg-type]
    assert 0.2 < float(judged.detach().std()) < 2
