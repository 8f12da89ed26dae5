"""Prompts that people wrote, with the concepts of which one is expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fewstep.core.types import UserError
from fewstep.evaluate.metric import ImageBatch, Prompt, References
from fewstep.evaluate.metric import Reference as RealImage
from fewstep.pocket.human_prompts import HumanPrompt, WrittenRetrieval, load
from fewstep.pocket.stickers import Reference

BLANK = np.zeros((3, 8, 8), np.uint8)
REFERENCES = [Reference(name, "3d", False, BLANK, name) for name in ("dog", "dog face", "cat", "car")]
GALLERY = References([RealImage(BLANK, each) for each in REFERENCES], np.eye(4, dtype=np.float32))


def file(at: Path, text: str) -> Path:
    (at / "prompts.tsv").write_text(text)
    return at / "prompts.tsv"


def test_lines_name_a_prompt_and_what_may_be_found(tmp_path: Path) -> None:
    read = load(file(tmp_path, "# a comment\n\na doggo pls\tdog|dog face\nkitty\tcat\n"), REFERENCES)
    assert read == (HumanPrompt("a doggo pls", ("dog", "dog face")), HumanPrompt("kitty", ("cat",)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a dog", "line 1"),
        ("a dog\tdog\nkitty\tkitten", "'kitten'"),
        ("\tdog", "line 1"),
        ("# nothing\n", "no prompts"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(file(tmp_path, text), REFERENCES)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.tsv", REFERENCES)


def test_any_of_the_expected_concepts_will_do() -> None:
    prompts = [
        HumanPrompt("doggo", ("dog", "dog face")),
        HumanPrompt("kitty", ("cat",)),
        HumanPrompt("wheels", ("car", "dog")),
    ]
    drawn = np.array([[0.1, 0.9, 0, 0], [0.8, 0, 0.6, 0], [0, 0, 0.9, 0.1]], np.float32)
    metric = WrittenRetrieval(GALLERY)
    metric.update(
        ImageBatch(np.stack([BLANK] * 3), drawn), [Prompt(each.prompt, each, "written") for each in prompts]
    )
    assert metric.found(1).tolist() == [1, 0, 0]
    assert metric.found(2).tolist() == [1, 1, 1]
    assert metric.compute()["written_top1"].value == pytest.approx(1 / 3)


def test_the_prompts_of_the_repository_are_many(tmp_path: Path) -> None:
    lines = (
        (Path(__file__).parents[2] / "src/fewstep/pocket/prompts/human_written.tsv").read_text().splitlines()
    )
    assert len(lines) >= 200 and all("\t" in line for line in lines)
