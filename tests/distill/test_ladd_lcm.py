"""LADD and LCM as recipes: students of one step, LoRA, and options that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fewstep.core.types import UserError
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.write import write_samples
from fewstep.distill.adversarial import spaced
from fewstep.distill.config import DistillConfig
from fewstep.distill.recipes import load_recipe
from fewstep.families import sd3
from fewstep.families.common import fingerprint
from fewstep.pipeline.loading import load_family
from fewstep.train.run import Run
from fewstep.train.trainer import train

pytestmark = pytest.mark.slow(20)

PROMPTS = ["a cat", "a dog", "a red apple", "two pears"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and its samples."""
    root = tmp_path_factory.mktemp("sd3")
    sd3.assemble(tiny.parts(), name="teacher", guidance=3.0).save(root / "teacher")
    loaded = load_family(str(root / "teacher"))
    plan = manifest.make(
        loaded, PROMPTS, guidance=3.0, steps=4, student_steps=4, weights=fingerprint(loaded.net),
        clip_length=loaded.clip_length,
    )  # fmt: skip
    write_samples(loaded.with_guidance(3.0), PROMPTS, plan, root / "shards")
    return root


def recipe(made: Path, name: str, out: Path, **options: Any) -> Run:
    shared = {key: options.pop(key) for key in list(options) if key in DistillConfig.__dataclass_fields__}
    usual: dict[str, Any] = {"steps": 2, "batch_size": 2, "device": "cpu", "lr": 1e-3}
    places: dict[str, Any] = {"teacher": str(made / "teacher"), "samples": made / "shards", "output": out}
    return load_recipe(name)(config=DistillConfig(**usual | places | shared), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ladd", {}),
        ("ladd", {"disc_input": "finals", "disc_density": "uniform", "disc_shift": 1.0, "heads": "token"}),
        ("ladd", {"lora": 2, "num_taps": 1}),
        ("lcm", {}),
        ("lcm", {"target_ema": 0.0, "loss": "l2"}),
        ("lcm", {"lora": 2}),
    ],
)
def test_a_student_of_one_step_learns(made: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    train(recipe(made, name, tmp_path, student_steps=1, **options))
    student, teacher = load_family(str(tmp_path / "model")), load_family(str(made / "teacher"))
    assert student.steps == 1
    assert fingerprint(student.net) != fingerprint(teacher.net)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_target_starts_as_the_student_and_stays_behind_it(made: Path, tmp_path: Path, lora: int) -> None:
    run = recipe(made, "lcm", tmp_path, lora=lora, target_ema=0.9)
    student, target = (list(run.method.nets[name].parameters()) for name in ("student", "target"))
    start = [p.detach().clone() for p in student]
    assert all(torch.equal(p, q) for p, q in zip(start, target, strict=True))
    train(Run(**vars(run) | {"finish": None, "averaged": [], "preview": None}))
    moved = sum(float((p - q).detach().square().sum()) for p, q in zip(student, start, strict=True))
    behind = sum(float((p - q).detach().square().sum()) for p, q in zip(target, start, strict=True))
    assert 0 < behind < 0.1 * moved


@pytest.mark.parametrize("student_steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["ladd", "lcm"])
def test_trajectory_guidance_comes_beside_the_loss(
    made: Path, tmp_path: Path, name: str, student_steps: int
) -> None:
    run = recipe(made, name, tmp_path, student_steps=student_steps, trajectory_weight=2.0)
    train(run)
    record = (tmp_path / "log.jsonl").read_text().splitlines()
    assert '"trajectory"' in record[-1]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_target_without_average_is_no_net(made: Path, tmp_path: Path, lora: int) -> None:
    assert set(recipe(made, "lcm", tmp_path, lora=lora, target_ema=0.0).method.nets) == {"student"}


@pytest.mark.parametrize(("words", "rate"), [([], 1e-5), (["--lr", "3e-4"], 3e-4)])
def test_ladd_has_a_lower_rate_of_its_own(words: list[str], rate: float) -> None:
    from fewstep.cli.train import distill

    _, bound, _ = distill.parse_args(["ladd", "--steps", "3", "--samples", "x", *words])
    config = bound.arguments["config"]
    assert (config.lr, config.steps, config.samples) == (rate, 3, Path("x"))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ladd", {"heads_updates": 0}, "--heads-updates must be at least 1, not 0"),
        ("ladd", {"num_taps": 0}, "--num-taps must be at least 1, not 0"),
        ("ladd", {"disc_shift": 0.0}, "shift of times must be a positive number, not 0.0"),
        ("ladd", {"heads_lr": -1.0}, "--heads-lr must be a positive number"),
        ("ladd", {"trajectory_weight": -1.0}, "--trajectory-weight must be a number of at least 0"),
        ("ladd", {"trajectory_weight": 1.0, "student_steps": 3}, "of no use to a student of 3"),
        ("lcm", {"target_ema": 1.0}, "--target-ema must be at least 0 and below 1, not 1.0"),
        ("lcm", {"target_ema": float("nan")}, "--target-ema must be at least 0 and below 1, not nan"),
        ("lcm", {"teacher_steps": 0}, "--teacher-steps must be at least 1, not 0"),
    ],
)
def test_options_out_of_range_are_one_line(
    made: Path, tmp_path: Path, name: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        recipe(made, name, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_tapped_blocks_are_spread_over_the_net() -> None:
    blocks: list[Any] = list(range(12))
    assert spaced(blocks, 3) == [3, 7, 11]
    assert spaced(blocks, 1) == [11]
    assert spaced(blocks, 99) == blocks
