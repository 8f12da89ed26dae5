"""A run: right figures where the truth is known, and the same results however it is interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.core.types import UserError
from fewstep.evaluate import Candidate, Prompt, PromptGroup, PromptSet, evaluate, metric
from fewstep.pocket.prompt_sets import pocket
from painted import Painter, Pixels, painter, prompt_set, references

OUTPUTS = ("results.json", "results.md", "sheet-painter.png")


def test_copies_score_full_marks_and_noise_scores_chance(tmp_path: Path) -> None:
    gallery = references()
    by_prompt = {reference.prompt: reference.image for reference in gallery}
    copier = Candidate("copier", lambda prompts, seeds: np.stack([by_prompt[p] for p in prompts]), "copier")

    def scatter(prompts: object, seeds: list[int]) -> np.ndarray:
        rows = [gallery[int(np.random.default_rng(seed).integers(len(gallery)))].image for seed in seeds]
        return np.stack(rows)

    scattered = Candidate("scatter", scatter, "scatter")
    got = evaluate([copier, scattered], prompt_set(40), tmp_path, seeds=4, extractor=Pixels())
    copies, noise = (row.figures for row in got.rows)
    for name in ("seen_top1", "held_out_top1", "seen_pair_top1", "held_out_pair_top1"):
        assert copies[name].value == 1
    assert copies["diversity"].value == 0
    assert copies["kid"].value == pytest.approx(0, abs=1e-9)
    assert noise["seen_top1"].low <= 1 / 20 <= noise["seen_top1"].high
    assert noise["seen_pair_top1"].low <= 1 / 40 <= noise["seen_pair_top1"].high


def test_against_the_teacher(tmp_path: Path) -> None:
    twin = replace(painter(), label="twin")
    stiff = painter("stiff", moves=False)
    again = {reference.prompt: reference for reference in references(seed=1)}
    ceilings = {"real": lambda chosen: [again[reference.prompt] for reference in chosen]}
    got = evaluate(
        [painter(), twin, stiff], prompt_set(40, ceilings=ceilings), tmp_path, teacher="painter", seeds=3,
        extractor=Pixels(), command="fewstep evaluate ...",
    )  # fmt: skip
    rows = {row.label: row for row in got.rows}
    assert list(rows) == ["real", "painter", "twin", "stiff"]
    assert (rows["painter"].images, rows["real"].images) == (120, 40)
    assert "kid_teacher" not in rows["painter"].figures
    same = rows["twin"].figures
    assert same["kid_teacher"].value == pytest.approx(0, abs=1e-9)
    for name in ("seen_top1_ratio", "seen_top5_ratio", "held_out_top5_ratio", "diversity_ratio"):
        assert (same[name].low, same[name].value, same[name].high) == (1, 1, 1)
    assert rows["stiff"].figures["diversity_ratio"].value == 0
    assert rows["stiff"].figures["kid_teacher"].value > 0
    # A real rendering is what the painter paints, so it must do as well.
    assert rows["real"].figures["seen_top1"].value > 0.5
    table = (tmp_path / "results.md").read_text()
    assert "| twin | 120 |" in table
    assert "Features: pixels-12x12" in table


def test_chosen_metrics_replace_those_of_the_prompt_set(tmp_path: Path) -> None:
    chosen = [metric.load("diversity"), metric.load("frechet")]
    got = evaluate([painter()], prompt_set(6), tmp_path, seeds=2, metrics=chosen, extractor=Pixels())
    figures = got.rows[0].figures
    assert list(figures) == ["diversity", "frechet"]
    assert figures["frechet"].low <= figures["frechet"].value <= figures["frechet"].high
    table = (tmp_path / "results.md").read_text()
    assert "| model | images | diversity |" in table
    assert "Further figures:\n\n| model | images | frechet |" in table
    assert "right style" not in table


def test_interrupted_and_resumed_is_the_same(tmp_path: Path) -> None:
    whole, broken = Painter(), Painter(break_after=1)
    run = {"seeds": 4, "extractor": Pixels()}
    evaluate([Candidate("painter", whole, "p")], prompt_set(20), tmp_path / "a", **run)
    with pytest.raises(KeyboardInterrupt):
        evaluate([Candidate("painter", broken, "p")], prompt_set(20), tmp_path / "b", **run)
    assert not (tmp_path / "b" / "results.json").exists()
    rest, extractor = Painter(), Pixels()
    run["extractor"] = extractor
    evaluate([Candidate("painter", rest, "p")], prompt_set(20), tmp_path / "b", **run)
    assert whole.calls == [32, 32, 16]
    assert rest.calls == [32, 16]
    assert extractor.seen == 48  # neither references nor the kept chunk again
    for name in OUTPUTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_other_weights_are_drawn_again(tmp_path: Path) -> None:
    first, again, changed = Painter(), Painter(), Painter(moves=False)
    for model, identity in ((first, "1"), (again, "1"), (changed, "2")):
        evaluate([Candidate("m", model, identity)], prompt_set(4), tmp_path, seeds=2, extractor=Pixels())
    assert [first.calls, again.calls, changed.calls] == [[8], [], [8]]


def test_results_say_how_to_repeat_them(tmp_path: Path) -> None:
    evaluate([painter()], prompt_set(6), tmp_path, seeds=2, first_seed=7, extractor=Pixels(), command="c")
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["seen"], results["held_out"], results["seeds"], results["first_seed"]) == (3, 3, 2, 7)
    assert (results["references"], results["concepts"]) == (40, 20)
    assert (results["prompt_set"], results["prompts"]) == ("pocket", 6)
    assert results["extractor"] == "pixels-12x12"
    assert results["command"] == "c"
    assert {"numpy", "onnxruntime"} <= results["versions"].keys()
    with Image.open(tmp_path / "sheet-painter.png") as page:
        assert page.width > 3 * 48


def test_without_held_out_pairs_and_with_one_seed(tmp_path: Path) -> None:
    seen = [reference for reference in references() if not reference.held_out]
    got = evaluate([painter()], pocket.build(seen, 8), tmp_path, seeds=1, extractor=Pixels())
    assert set(got.rows[0].figures) == {"seen_top1", "seen_top5", "seen_pair_top1", "seen_pair_top5"}


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    good = prompt_set()
    with pytest.raises(UserError, match="no model"):
        evaluate([], good, tmp_path, extractor=Pixels())
    with pytest.raises(UserError, match="once a run"):
        evaluate([painter(), painter()], good, tmp_path, extractor=Pixels())
    with pytest.raises(UserError, match="teacher nobody is not among"):
        evaluate([painter()], good, tmp_path, teacher="nobody", extractor=Pixels())
    with pytest.raises(UserError, match="at least 2 prompts"):
        evaluate([painter()], PromptSet("one", (PromptGroup([Prompt("a")]),)), tmp_path, extractor=Pixels())
    with pytest.raises(UserError, match="seeds must be"):
        evaluate([painter()], good, tmp_path, seeds=0, extractor=Pixels())
    with pytest.raises(UserError, match="seeds of all images"):
        evaluate([painter()], good, tmp_path, first_seed=2**32 - 8, extractor=Pixels())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        evaluate([painter()], prompt_set(2), tmp_path / "file", extractor=Pixels())


def test_damaged_cache_is_said(tmp_path: Path) -> None:
    evaluate([painter()], prompt_set(4), tmp_path, seeds=2, extractor=Pixels())
    (kept,) = (tmp_path / "cache" / "painter").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged; delete it"):
        evaluate([painter()], prompt_set(4), tmp_path, seeds=2, extractor=Pixels())
