"""A family that one file outside the package adds generates, fits a memory limit and is distilled."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
import outside_family as outside
import tiny
from fewstep.cli import app as cli
from fewstep.core import sampling, schedule
from fewstep.core.types import Cond, UserError
from fewstep.distill import validation
from fewstep.families import registry
from fewstep.families.common import append_mask, split_mask
from fewstep.families.presets import read_spec
from fewstep.images.io import open_image
from fewstep.images.pixels import to_pil, to_uint8
from fewstep.pipeline import loading
from fewstep.pocket.config import byte_tokenizer

pytestmark = pytest.mark.slow(5)

PROMPTS = ["a cat", "a red apple"]
SOURCE = Path(fewstep.__file__).parent


def parts() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextModel

    tokenizer = byte_tokenizer(tiny.LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "transformer": outside.GridTransformer(4, 8, 16, 24, 2),
            "vae": tiny.vae(4),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "tokenizer": tokenizer,
            "text_encoder": CLIPTextModel(tiny.clip(tokenizer, 24, "quick_gelu").config),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("outside") / "model"
    outside.ARCHITECTURE.assemble(parts(), name="small").save(at)
    return at


@pytest.fixture
def name(folder: Path) -> str:
    return f"outside_family:{folder}"


def test_nothing_in_the_package_names_it() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    assert "outside_family" not in text and "GridTransformer" not in text and "GridPipeline" not in text


@pytest.mark.parametrize("options", [{}, {"memory": "64GiB", "bits": 32}], ids=["plain", "planned"])
def test_it_generates(name: str, options: Any) -> None:
    family = loading.load_family(name)
    images = fewstep.load(name, **options)(PROMPTS, seed=1, steps=3, guidance=1)
    with torch.no_grad():
        noise = family.from_numpy(sampling.batch_noise([1, 1], family.latent))
        grid = schedule.grid(3, family.shift)
        x = sampling.sample_flow(family.velocity, noise, grid, family.text(PROMPTS))
        expected = to_pil(to_uint8(family.codec.decode(x)))
    assert np.asarray(images[0]).std() > 1
    for image, other in zip(images, expected, strict=True):
        assert abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1


def test_padding_does_not_change_an_image() -> None:
    family = outside.ARCHITECTURE.assemble(parts(), name="small")
    cond = family.text(["a cat"])
    context, mask = split_mask(cond.context)
    assert 2 < int(mask.sum()) < tiny.LENGTH
    other = append_mask(torch.where(mask[..., None], context, 7.0), mask)
    x, t = torch.ones(1, *family.latent), torch.tensor([0.5])
    changed = family.velocity(x, t, Cond(other, cond.pooled))
    assert torch.equal(changed, family.velocity(x, t, cond))


def test_the_command_line_takes_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    asked = ["generate", "a cat", "--model", name, "--steps", "2", "--seed", "1", "-o", str(path)]
    assert cli.run(asked) == 0
    assert open_image(path).size == (64, 64)


def test_an_entry_point_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("grid", "outside_family", "fewstep.family")
    monkeypatch.setattr(registry, "_entry_points", lambda: {"grid": point})
    assert loading.kind_of(f"grid:{folder}") == "grid"


def test_its_spec_needs_no_weights(name: str, folder: Path) -> None:
    spec, family = read_spec(name), loading.load_family(name)
    cond = family.text(["a cat"])
    assert (*spec.context_shape, spec.pooled_dim) == (*cond.context.shape[1:], cond.pooled.shape[1])
    assert spec.side == 64


@pytest.mark.parametrize("options", [{}, {"lora": 2}], ids=["full", "lora"])
def test_one_step_of_distillation_trains_it(
    name: str, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.data.teacher_samples import manifest
    from fewstep.data.teacher_samples.write import write_samples
    from fewstep.families.common import fingerprint

    monkeypatch.setattr(validation, "NUM_IMAGES", 2)
    teacher = loading.load_family(name)
    plan = manifest.make(
        teacher, PROMPTS, guidance=2.0, steps=4, student_steps=4, weights=fingerprint(teacher.net),
        clip_length=teacher.clip_length,
    )  # fmt: skip
    write_samples(teacher, PROMPTS, plan, tmp_path / "samples")
    given = {"--teacher": name, "--samples": tmp_path / "samples", "--output": tmp_path / "run"}
    given |= {"--steps": 1, "--batch-size": 2, "--device": "cpu"}
    given |= {f"--{option}": value for option, value in options.items()}
    words = [str(word) for pair in given.items() for word in pair]
    assert cli.run(["distill", "trajectory", *words]) == 0
    student = loading.load_family(f"outside_family:{tmp_path / 'run'}")
    assert (student.kind, student.steps, student.guidance) == ("grid", 4, None)
    pairs = zip(student.net.parameters(), teacher.net.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)


# --- what is refused ---


def test_a_folder_cannot_name_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "outside_family")
    with pytest.raises(
        UserError, match=r"holds a GridPipeline; what can be read is a .*FluxPipeline or a Stable"
    ):
        fewstep.load(folder)
    assert "outside_family" not in sys.modules
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["outside_family", "GridTransformer"]


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("no.such.module", "cannot import the family no.such.module:ARCHITECTURE: No module named 'no'"),
        ("tiny", "cannot import the family tiny:ARCHITECTURE"),
        ("sd3", "is of the family"),
    ],
)
def test_what_is_no_family_is_one_line(
    family: str, named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "a cat", "--model", f"{family}:{folder}", "-o", str(folder.parent / "x.png")]
    assert cli.run(asked) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line or "GridPipeline" in line


def test_a_path_that_exists_has_no_family_in_front(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outside_family:here").mkdir()
    assert loading.parse_family("outside_family:here") == (None, "outside_family:here")
    assert loading.parse_family("outside_family:there") == ("outside_family", "there")
    assert loading.parse_family("nothing_here:there") == (None, "nothing_here:there")
