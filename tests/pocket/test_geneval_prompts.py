"""Scene prompts: fixed, balanced, saying all of their truth, and on the right side of the split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tests.helpers.asked_stickers import renderings

from fewstep.core.types import UserError
from fewstep.pocket.captions import COLOURS, plural
from fewstep.pocket.compose import RELATIONS, Composer
from fewstep.pocket.concepts import held_out
from fewstep.pocket.detector_data import DetectionDataset
from fewstep.pocket.geneval_prompts import CATEGORIES, Scene, prompts, scene_images

STICKERS = renderings()
SCENES = prompts(STICKERS, 240)


def test_prompts_are_the_same_at_every_call_and_grow_from_their_start() -> None:
    again = prompts(renderings(), 240)
    assert again == SCENES
    fewer = prompts(STICKERS, 48)
    assert all(scene in SCENES for scene in fewer)
    assert prompts(STICKERS, 48, seed=1) != fewer


def test_every_category_has_both_halves_and_no_prompt_twice() -> None:
    cells = Counter((scene.category, scene.held_out) for scene in SCENES)
    assert cells == {(category, half): 20 for category in CATEGORIES for half in (False, True)}
    assert len({scene.prompt for scene in SCENES}) == len(SCENES)


def test_a_prompt_says_its_whole_truth() -> None:
    for scene in SCENES:
        said = scene.prompt.lower()
        name = plural if scene.category == "counting" else str
        assert all(name(thing).lower() in said for thing in scene.objects), scene
        assert (scene.background is not None) == (scene.category == "colours")
        assert (scene.relation is not None) == (scene.category == "position")
        assert scene.background is None or (scene.background in said and scene.background != "white")
        assert scene.relation is None or (scene.relation in RELATIONS and scene.relation in said)
        many = {"single": 1, "colours": 1, "counting": len(scene.objects)}.get(scene.category, 2)
        assert len(scene.objects) == many >= 1


def test_binding_names_two_colours_of_two_things() -> None:
    for scene in (s for s in SCENES if s.category == "binding"):
        (first, a), (second, b) = (thing.rsplit(" ", 1) for thing in scene.objects)
        assert first != second
        assert a != b
        assert {first, second} <= set(COLOURS)


def test_held_out_scenes_are_never_trained_on() -> None:
    """Against what the composer really draws for training, not against the rule alone."""
    train = Composer(STICKERS, size=8, scenes=0.7)
    pairs, sets = set[tuple[str, str]](), set[tuple[str, ...]]()
    for sample in (train(i) for i in range(3000)):
        pairs |= {(thing.concept, thing.style) for thing in sample.objects}
        sets.add(tuple(sorted(thing.concept for thing in sample.objects)))
    sets = {things for things in sets if len(things) > 1}
    assert len(pairs) > 500
    assert len(sets) > 1500
    for scene in SCENES:
        own = _pairs(scene)
        if len(scene.objects) > 1:
            assert not (scene.held_out and tuple(sorted(scene.objects)) in sets), scene
            assert not any(held_out(*pair) for pair in own)
        else:
            assert not (scene.held_out and own & pairs), scene
            assert scene.held_out == any(held_out(*pair) for pair in own)


def test_real_pictures_show_the_scene_and_are_placed_anew() -> None:
    some = SCENES[::12]
    first, second = scene_images(STICKERS, some), scene_images(STICKERS, some, seed=2)
    assert first.shape == (20, 3, 16, 16)
    assert first.dtype == np.uint8
    assert np.array_equal(first, scene_images(STICKERS, some))
    assert not np.array_equal(first, second)
    for scene, picture in zip(some, first, strict=True):
        assert tuple(picture[:, 0, 0]) == COLOURS[scene.background or "white"]


@pytest.mark.parametrize("many", [0, -12, 13])
def test_scenes_come_in_twelves(many: int) -> None:
    with pytest.raises(UserError, match="scenes come in 12s"):
        prompts(STICKERS, many)


def test_too_few_renderings_are_said() -> None:
    with pytest.raises(UserError, match="too few of the things"):
        prompts(renderings(names=("dog", "cat")), 12)
    few = renderings(names=("dog", "cat", "fox", "lion", "red heart", "blue heart", "red apple", "blue book"))
    with pytest.raises(UserError, match="ask for fewer"):
        prompts(few, 12)


def test_a_crowd_is_where_it_says() -> None:
    crowds = DetectionDataset(STICKERS, size=64, seed=3)
    again = DetectionDataset(renderings(), size=64, seed=3)
    many = Counter[int]()
    for index in range(40):
        picture, found = crowds(index)
        assert np.array_equal(picture, again(index)[0])
        assert picture.shape == (64, 64, 3)
        many[len(found)] += 1
        ground = np.median(picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float), axis=0)
        for thing in found:
            x, y = (min(max(int(v * 64), 0), 63) for v in (thing.x, thing.y))
            assert np.abs(picture[y, x] - ground).max() > 20
            reach = thing.side / 2 - 0.05
            assert thing.x - reach > -0.01
            assert thing.y + reach < 1.01
    assert {1, 2, 4} <= set(many)


def _pairs(scene: Scene) -> set[tuple[str, str]]:
    rows = (STICKERS.pairs[row] for row in scene.rows)
    return {(STICKERS.concepts[index].name, style) for index, style in rows}
