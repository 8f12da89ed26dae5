"""The scene score: right pictures are right, wrong ones are not, and the detector finds what is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from tests.helpers.asked_stickers import renderings

from fewstep.core.types import UserError
from fewstep.evaluate import Candidate, evaluate
from fewstep.pocket import geneval
from fewstep.pocket.captions import COLOURS
from fewstep.pocket.concepts import Concept
from fewstep.pocket.detector import BoxDetector, Detection, Detector, background_name, border_colour, lab
from fewstep.pocket.geneval import GenEvalTest, Verdict, judge, measure, relations, verdict
from fewstep.pocket.geneval_prompts import CATEGORIES, Scene, prompts, scene_images
from fewstep.pocket.render import Renderings
from fewstep.pocket.template_matching import CELLS, OBJECT_SHARE, Box, TemplateBank, crop
from painted import Pixels, painter, picture, prompt_set

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models/scene-detector"
DATA = ROOT / "data/stickers"
CONCEPTS = {name: place for place, name in enumerate(("cat", "dog", "cup", "key", "sun"))}
PLAIN = np.full((3, 64, 64), 255, np.uint8)


def thing(name: str, x: float = 0.5, y: float = 0.5, side: float = 0.4, alike: float = 0.9) -> Detection:
    likeness = np.linspace(0.1, 0.2, len(CONCEPTS))
    likeness[CONCEPTS[name]] = alike
    return Detection(Box(x, y, side, 0.9), likeness)


@pytest.fixture(autouse=True)
def nearest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among five concepts, only the nearest counts."""
    monkeypatch.setattr(geneval, "TOP", 1)


def scene(
    category: str,
    *things: str,
    ground: str | None = None,
    relation: str | None = None,
    held_out: bool = False,
) -> Scene:
    return Scene(category, " ".join(things), (0,) * len(things), things, ground, relation, held_out)


LEFT, RIGHT = thing("cat", 0.26), thing("dog", 0.74)
PAIRED = scene("position", "cat", "dog", relation="to the left of")


def told(asked: Scene, things: Sequence[Detection], image: NDArray[np.uint8] = PLAIN) -> Verdict:
    return verdict(asked, things, CONCEPTS, image)


@pytest.mark.parametrize(
    ("asked", "things", "right", "why"),
    [
        (scene("single", "cat"), [thing("cat")], True, ""),
        (scene("single", "cat"), [thing("cat", 0.2), thing("sun", 0.8)], True, ""),
        (scene("single", "cat"), [thing("dog")], False, "0 of 1 cat"),
        (scene("single", "cat"), [], False, "0 of 1 cat"),
        (scene("single", "cat"), [thing("cat", alike=0.7)], False, "0 of 1 cat"),
        (scene("two", "cat", "dog"), [LEFT, RIGHT], True, ""),
        (scene("two", "cat", "dog"), [LEFT, thing("cat", 0.74)], False, "0 of 1 dog"),
        (scene("counting", "cup", "cup"), [thing("cup", 0.2), thing("cup", 0.8)], True, ""),
        (scene("counting", "cup", "cup"), [thing("cup")], False, "1 of 2 cup"),
        (scene("counting", "cup", "cup"), [thing("cup", v) for v in (0.1, 0.5, 0.9)], False, "3 of 2 cup"),
        (PAIRED, [LEFT, RIGHT], True, ""),
        (PAIRED, [thing("cat", 0.74), thing("dog", 0.26)], False, "not to the left of"),
        (PAIRED, [thing("cat", 0.5, 0.2), thing("dog", 0.5, 0.8)], False, "not to the left of"),
        (PAIRED, [thing("cat", 0.48), thing("dog", 0.52)], False, "not to the left of"),
    ],
)
def test_genevals_rules(asked: Scene, things: list[Detection], right: bool, why: str) -> None:
    assert told(asked, things) == Verdict(right, why)


def test_one_thing_does_not_stand_for_two() -> None:
    both = np.array([0.9, 0.9, 0.1, 0.1, 0.1])
    assert (
        told(scene("two", "cat", "dog"), [Detection(Box(0.5, 0.5, 0.8, 1), both)]).reason
        == "one thing for two"
    )


@pytest.mark.parametrize("name", COLOURS)
def test_the_ground_is_told_in_all_colours(name: str) -> None:
    image = np.broadcast_to(np.array(COLOURS[name], np.uint8)[:, None, None], (3, 64, 64)).copy()
    image[:, 6:58, 6:58] = 127
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    assert background_name(image) == background_name(noisy) == name
    asked = scene("colours", "cat", ground=name)
    other = "green" if name != "green" else "red"
    assert told(asked, [thing("cat")], image).right
    assert told(replace(asked, background=other), [thing("cat")], image).reason == f"on {name}"
    assert told(asked, [thing("dog")], image).reason == "0 of 1 cat"


def test_lab_knows_grey_and_red() -> None:
    white, black, red = lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]]))
    assert white == pytest.approx([100, 0, 0], abs=0.05)
    assert black == pytest.approx([0, 0, 0], abs=0.05)
    assert red == pytest.approx([53.2, 80.1, 67.2], abs=0.2)


def test_relations_are_opposite_and_need_room() -> None:
    a, b = Box(0.3, 0.3, 0.3, 1), Box(0.7, 0.6, 0.3, 1)
    assert relations(a, b) == {"to the left of", "above"}
    assert relations(b, a) == {"to the right of", "below"}
    assert relations(a, replace(a, x=0.34, y=0.25)) == set()


def test_measures_are_shares_of_prompts() -> None:
    asked = [scene(category, "cat", held_out=held) for category in CATEGORIES for held in (False, True)]
    got = measure([Verdict(not s.held_out) for s in asked], asked).figures
    assert (got["scene"].value, got["scene_seen"].value, got["scene_held_out"].value) == (0.5, 1, 0)
    assert all(got[f"scene_{category}"].value == 0.5 for category in CATEGORIES)
    assert got["scene"].low < 0.5 < got["scene"].high


def test_a_cut_is_placed_as_renderings_are() -> None:
    image = np.zeros((3, 100, 100), np.uint8)
    image[:, 20:60, 10:50] = 255
    got = crop(image, Box(0.3, 0.4, 0.4, 1))
    assert got.shape == (3, CELLS, CELLS)
    rows, columns = (got[0].mean(axis) / 255 for axis in (1, 0))
    assert rows == pytest.approx(rows[::-1], abs=0.02)
    assert columns == pytest.approx(rows, abs=0.02)
    assert rows.sum() / rows.max() == pytest.approx(OBJECT_SHARE * CELLS, abs=0.5)
    # Beyond the picture its border goes on.
    assert (crop(np.full((3, 50, 40), 9, np.uint8), Box(0.0, 1.0, 0.9, 1)) == 9).all()


class Tellers:
    """What finds, in tests: the truth of real scenes, nothing in any other picture."""

    def __init__(self, asked: Sequence[Scene], real: NDArray[np.uint8]) -> None:
        self.concepts = {name: place for place, name in enumerate({n: 0 for s in asked for n in s.objects})}
        self._known = {image.tobytes(): s for image, s in zip(real, asked, strict=True)}

    def __call__(self, images: NDArray[np.uint8]) -> list[list[Detection]]:
        return [self._in(self._known.get(image.tobytes())) for image in images]

    def _in(self, known: Scene | None) -> list[Detection]:
        if known is None:
            return []
        spots = [(0.2, 0.5), (0.8, 0.5), (0.2, 0.9), (0.8, 0.9)]
        if known.relation in ("above", "below"):
            spots = [(0.5, 0.2), (0.5, 0.8)]
        if known.relation in ("to the right of", "below"):
            spots = spots[1::-1]
        found: list[Detection] = []
        for name, (x, y) in zip(known.objects, spots, strict=False):
            likeness = np.zeros(len(self.concepts))
            likeness[self.concepts[name]] = 1
            found.append(Detection(Box(x, y, 0.3, 1), likeness))
        return found


def small_test(many: int = 24) -> GenEvalTest:
    asked = prompts(renderings(), many)
    real = scene_images(renderings(), asked)
    # Two prompts may have the same small disc in the same place: mark each picture with its number.
    for index, image in enumerate(real):
        image[:, 8, 8] = (index % 256, index // 256, 77)
    find = Tellers(asked, real)
    return GenEvalTest(tuple(asked), find, find.concepts, "teller", real)


def test_in_the_harness(tmp_path: Path) -> None:
    test = small_test()
    by_prompt = dict(zip([scene.prompt for scene in test.scenes], test.real, strict=True))
    asked_seeds: list[int] = []

    def draw(words: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        if words[0] not in by_prompt:
            return painter().draw(words, seeds)
        asked_seeds.extend(seeds)
        return np.stack([by_prompt[word] for word in words])

    def halves(words: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
        images = draw(words, seeds)
        if images.shape[-1] == 16:
            images[1::2] = 0
        return images

    models = [Candidate("copier", draw, "1"), Candidate("half", halves, "2")]
    options = {"teacher": "copier", "seeds": 1, "extractor": Pixels()}
    got = evaluate(models, prompt_set(6, scenes=test), tmp_path, **options)
    rows = {row.label: row.figures for row in got.rows}
    assert list(rows) == ["real scenes", "copier", "half"]
    for label in ("real scenes", "copier"):
        assert all(rows[label][f"scene_{c}"].value == 1 for c in CATEGORIES)
        assert "scene_ratio" not in rows[label]
    assert rows["half"]["scene"].value == rows["half"]["scene_ratio"].value == 0.5
    assert {"seen_top1", "scene_seen"} <= rows["half"].keys()
    assert asked_seeds == [*range(1_000_000, 1_000_024)] * 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["scenes"], results["detector"]) == (24, "teller")
    table = (tmp_path / "results.md").read_text()
    assert "Scene score, 24 prompts" in table
    assert "| half | 24 | 50 [" in table
    for name in ("scenes-copier", "scenes-half", "scenes-real-scenes", "sheet-half"):
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.width > 100
    # Everything is kept: a second run draws nothing.
    asked_seeds.clear()
    evaluate(models, prompt_set(6, scenes=test), tmp_path, **options)
    assert asked_seeds == []


def test_scenes_change_no_other_figure(tmp_path: Path) -> None:
    small = {"seeds": 2, "extractor": Pixels()}
    without = evaluate([painter()], prompt_set(6), tmp_path, **small).rows[0].figures
    blank = Candidate("painter", lambda words, seeds: _blank_or_painted(words, seeds), painter().identity)
    with_scenes = evaluate([blank], prompt_set(6, scenes=small_test(12)), tmp_path, **small).rows[1].figures
    assert with_scenes.items() >= without.items()
    assert with_scenes["scene"].value == 0


def _blank_or_painted(words: Sequence[str], seeds: Sequence[int]) -> NDArray[np.uint8]:
    try:
        return painter().draw(words, seeds)
    except (IndexError, ValueError, KeyError):
        return np.full((len(words), 3, 48, 48), 255, np.uint8)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no detector of scenes"):
        BoxDetector(tmp_path)
    (tmp_path / "detector.onnx").write_bytes(b"no graph")
    (tmp_path / "detector.json").write_text("{}")
    with pytest.raises(UserError, match=r"detector.json is damaged"):
        BoxDetector(tmp_path)
    (tmp_path / "detector.json").write_text('{"size": 128}')
    with pytest.raises(UserError, match="cannot be checked: it is no ONNX graph"):
        BoxDetector(tmp_path)(PLAIN[None])
    with pytest.raises(UserError, match="no renderings"):
        geneval.load(tmp_path, FOLDER, 12)


@pytest.mark.parametrize("size", [128, 192])
def test_the_shipped_net_counts_and_places_what_it_never_saw(size: int) -> None:
    """Discs and squares drawn here: one to four, on several grounds."""
    finder = BoxDetector(FOLDER)
    spots = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    images: list[NDArray[np.uint8]] = []
    truth: list[list[tuple[float, float]]] = []
    for tone in ("white", "pale blue", "dark green"):
        for many in (1, 2, 3, 4):
            page = Image.new("RGB", (size, size), COLOURS[tone])
            for number, (x, y) in enumerate(spots[:many]):
                side = round(0.36 * size)
                shape = picture(("circle", "square")[number % 2], "crimson", "filled", number, side)
                # Cut to the shape: its ground is not the page's.
                red = np.abs(shape.astype(int) - np.array([[[220]], [[20]], [[60]]])).sum(0) < 40
                place = round(x * size - side / 2), round(y * size - side / 2)
                page.paste(Image.fromarray(shape.transpose(1, 2, 0)), place, Image.fromarray(red))
            images.append(np.asarray(page).transpose(2, 0, 1))
            truth.append(spots[:many])
    for found, places in zip(finder(np.stack(images)), truth, strict=True):
        assert len(found) == len(places)
        for x, y in places:
            assert min(max(abs(box.x - x), abs(box.y - y)) for box in found) < 0.08
            assert all(0.15 < box.side < 0.45 for box in found)


def shapes() -> Renderings:
    """Four concepts, RGBA."""
    concepts: list[Concept] = []
    pictures: list[NDArray[np.uint8]] = []
    for shape in ("circle", "cross"):
        for tone in ("gold", "navy"):
            concepts.append(Concept(f"{tone} {shape}", (), (), shape, "test", ("flat",)))
            rgb = picture(shape, tone, "filled", 5, 128).transpose(1, 2, 0)
            there = np.abs(rgb.astype(int) - rgb[0, 0]).sum(2, keepdims=True) > 60
            rows, columns = there[..., 0].nonzero()
            rgba = np.concatenate([rgb, 255 * there], 2).astype(np.uint8)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            pictures.append(np.asarray(Image.fromarray(rgba).resize((128, 128), box=box)))
    return Renderings(concepts, [(i, "flat") for i in range(4)], np.stack(pictures))


@pytest.mark.parametrize("tone", ["white", "pale pink", "dark green"])
def test_a_thing_is_most_like_its_own_rendering(tone: str) -> None:
    known = shapes()
    gallery = TemplateBank(known)
    for place, concept in enumerate(known.concepts):
        assert gallery.concepts[concept.name] == place
        page = Image.new("RGB", (200, 200), COLOURS[tone])
        drawn = Image.fromarray(known.images[place]).resize((80, 80))
        page.paste(drawn, (30, 90), drawn)
        image = np.asarray(page.filter(ImageFilter.GaussianBlur(1.5))).transpose(2, 0, 1)
        likeness = gallery.similarity(image, Box(0.36, 0.64, 0.4, 1), border_colour(image))
        assert likeness.argmax() == place
        assert 0.9 < likeness[place] <= 1
        assert Detection(Box(0, 0, 1, 1), likeness).rank(place) == 0
    # Plain ground is like nothing.
    empty = gallery.similarity(PLAIN, Box(0.5, 0.5, 0.4, 1), np.full(3, 255.0))
    assert empty.max() < 0.01


def test_a_detector_joins_boxes_and_likeness() -> None:
    class One:
        name = "one"

        def __call__(self, images: NDArray[np.uint8]) -> list[list[Box]]:
            return [[Box(0.5, 0.5, OBJECT_SHARE, 1.0)] if image.any() else [] for image in images]

    detector = Detector(One(), TemplateBank(shapes()))  # type: ignore[arg-type]
    found = detector(np.stack([PLAIN, np.zeros_like(PLAIN)]))
    assert [len(things) for things in found] == [1, 0]
    assert found[0][0].similarity.shape == (4,)
    assert detector.name == "one"


@pytest.mark.data
def test_the_ceiling_on_real_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    test = geneval.load(DATA, FOLDER, 36)
    right = [v.right for v in judge(test.real, test)]
    assert np.mean(right) > 0.9
    # The same pictures under each other's prompts are wrong.
    shifted = replace(test, scenes=test.scenes[7:] + test.scenes[:7])
    assert np.mean([v.right for v in judge(test.real, shifted)]) < 0.05
