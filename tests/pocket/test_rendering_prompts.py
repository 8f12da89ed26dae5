"""The prompts of renderings: which are drawn, and with which seeds."""

from __future__ import annotations

import pytest

from fewstep.core.types import UserError
from fewstep.evaluate.run import plan
from fewstep.pocket.prompt_sets import pocket
from fewstep.pocket.rendering_prompts import choose
from painted import prompt_set, references


def test_prompts_are_fixed_and_balanced() -> None:
    chosen = choose(references(), 10)
    shuffled = choose(references()[::-1], 10)
    assert [each.prompt for each in chosen] == [each.prompt for each in shuffled]
    assert [each.held_out for each in chosen] == [False] * 5 + [True] * 5


def test_every_image_has_a_seed_of_its_own() -> None:
    (group,) = plan(prompt_set(10), seeds=3, first_seed=5).groups
    prompts = group.group.prompts
    assert group.seeds() == list(range(5, 35))
    assert group.prompts()[:4] == [prompts[0]] * 3 + [prompts[1]]
    assert [prompt.text for prompt in prompts] == [each.prompt for each in choose(references(), 10)]


def test_bad_input_is_one_line() -> None:
    with pytest.raises(UserError, match="no real renderings"):
        pocket.build([], 10)
    with pytest.raises(UserError, match="at least 2 prompts"):
        pocket.build(references(), 1)
