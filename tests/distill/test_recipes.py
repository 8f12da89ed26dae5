"""Every distillation as a recipe, on small random pipelines of both families: the same code for all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_flux
from fewstep.core import sampling, schedule
from fewstep.core.types import WHOLE, UserError
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.write import write_samples
from fewstep.distill import merge
from fewstep.distill.config import DistillConfig
from fewstep.distill.matching import MatchingConfig
from fewstep.distill.recipes import load_recipe
from fewstep.families import flux, sd3
from fewstep.families.common import fingerprint
from fewstep.pipeline.loading import load_family
from fewstep.train.run import Run
from fewstep.train.trainer import train

PROMPTS = ["a cat", "a dog", "a red apple", "two pears", "the sun", "a boat"]
RECIPES: dict[str, dict[str, Any]] = {
    "trajectory": {},
    "dmd": {"score_point": "shared", "proxy_target": "finals", "matching": MatchingConfig(ida_decay=0.98)},
    "tdm": {},
    "ladd": {},
    "lcm": {"teacher_steps": 4},
    "flash": {"warm_start_steps": 1, "split_steps": 1},
}


# Said by torch, once a process, of FLUX under autocast on a CPU: a mixed norm is not the fused one.
pytestmark = [
    pytest.mark.slow(85),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


@dataclass(frozen=True)
class Made:
    """A teacher's folder and its samples."""

    teacher: Path
    shards: Path

    def setting(self, out: Path, **options: Any) -> DistillConfig:
        usual: dict[str, Any] = {"steps": 1, "batch_size": 2, "device": "cpu"}
        told: dict[str, Any] = {"teacher": str(self.teacher), "samples": self.shards, "output": out}
        return DistillConfig(**usual | told | options)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "sd3":
        family = sd3.assemble(tiny.parts(), name="teacher", guidance=3.0)
    else:
        family = flux.assemble(tiny_flux.parts("dev"), name="teacher", side=8)
    family.save(root / "teacher")
    loaded = load_family(str(root / "teacher"))
    plan = manifest.make(
        loaded, PROMPTS, guidance=3.0, steps=4, student_steps=4, weights=fingerprint(loaded.net),
        clip_length=loaded.clip_length,
    )  # fmt: skip
    write_samples(loaded.with_guidance(3.0), PROMPTS, plan, root / "shards")
    return Made(root / "teacher", root / "shards")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try two ratios only: the tests do not measure how good the merged student is."""
    monkeypatch.setattr(merge, "RATIOS", (0.3, 0.7))


def carried(recipe: str, setting: DistillConfig, **options: Any) -> list[Run]:
    made = load_recipe(recipe)(config=setting, **RECIPES[recipe] | options)
    runs: list[Run] = []
    for run in made if isinstance(made, Iterator) else [made]:
        train(run)
        runs.append(run)
    return runs


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_ends_with_a_student_that_draws(made: Made, recipe: str, tmp_path: Path) -> None:
    carried(recipe, made.setting(tmp_path, gradient_accumulation_steps=2))
    student, teacher = load_family(str(tmp_path / "model")), load_family(str(made.teacher))
    assert (student.steps, student.guidance) == (4, None)
    moved = [
        not torch.equal(p, q) for p, q in zip(student.net.parameters(), teacher.net.parameters(), strict=True)
    ]
    assert any(moved)
    with torch.no_grad():
        noise, cond = student.from_numpy(sampling.batch_noise([3], student.latent)), student.text(["a cat"])
        assert (
            sampling.sample_flow(student.velocity, noise, schedule.grid(4, student.shift), cond)
            .isfinite()
            .all()
        )
    # A consistency model is drawn with fresh noise, by stock diffusers' scheduler as well.
    assert student.sampler == ("renoise" if recipe == "lcm" else "euler")
    assert bool(student.parts["scheduler"].config.stochastic_sampling) == (student.sampler == "renoise")
    if student.kind == "sd3":
        assert student.parts["text_encoder_3"] is None  # it learnt to do without


def test_frozen_weights_of_half_precision_learn_from_samples_of_whole(made: Made, tmp_path: Path) -> None:
    carried("trajectory", made.setting(tmp_path, lora=2, dtype="bfloat16"))
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("recipe", ["dmd", "flash"])
def test_roles_share_one_net_and_end_as_a_lora_and_a_whole_student(
    made: Made, recipe: str, tmp_path: Path
) -> None:
    runs = carried(recipe, made.setting(tmp_path, lora=2, lr=1e-2))
    bodies = {id(body.net) for body in runs[-1].bodies}
    assert len(bodies) == 1
    teacher, student = load_family(str(made.teacher)), load_family(str(tmp_path / "model"))
    assert fingerprint(teacher.net) != fingerprint(student.net)
    assert teacher.net.state_dict().keys() == student.net.state_dict().keys()
    folder = tmp_path if recipe == "dmd" else tmp_path / "2-flash"
    assert (folder / "lora/pytorch_lora_weights.safetensors").is_file()


def test_the_chain_says_what_merging_brought_and_is_done_once(made: Made, tmp_path: Path) -> None:
    runs = carried("flash", made.setting(tmp_path))
    assert [run.folder.name for run in runs] == ["1-warm", "2-flash", "3-split"]
    told = json.loads((tmp_path / "merge.json").read_text())
    assert [ratio for ratio, _ in told["curve"]] == [0.3, 0.7]
    assert told["late"] == min(told["curve"], key=lambda pair: pair[1])[0]
    before = fingerprint(load_family(str(tmp_path / "model")).net)
    carried("flash", made.setting(tmp_path))  # all is done: nothing is learnt any more
    assert fingerprint(load_family(str(tmp_path / "model")).net) == before


@pytest.mark.parametrize("lora", [0, 2])
def test_the_split_goes_on_with_the_proxy_and_the_heads_and_draws_anew(
    made: Made, tmp_path: Path, lora: int
) -> None:
    chain = load_recipe("flash")(config=made.setting(tmp_path, lora=lora), **RECIPES["flash"])
    for _ in range(2):
        before = next(chain)
        train(before)
    split = next(chain)
    for name in ("proxy", "heads"):
        pairs = zip(before.method.nets[name].parameters(), split.method.nets[name].parameters(), strict=True)
        assert all(torch.equal(p.detach(), q.detach()) for p, q in pairs), name
    assert split.options.seed != before.options.seed


def test_a_split_without_the_stage_before_is_refused(made: Made, tmp_path: Path) -> None:
    chain = load_recipe("flash")(config=made.setting(tmp_path), **RECIPES["flash"])
    for _ in range(2):
        train(next(chain))
    shutil.rmtree(tmp_path / "2-flash" / "checkpoints")
    with pytest.raises(UserError, match="has no whole checkpoint"):
        next(chain)


def test_a_chain_that_was_cut_ends_as_the_whole_one(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"split_steps": 0, "warm_start_steps": 1}
    (made.teacher / "LICENSE").write_text("of the teacher")
    for run in load_recipe("flash")(config=made.setting(tmp_path / "cut", steps=3), **options):
        if run.folder.name == "2-flash":
            train(replace(run, options=replace(run.options, steps=2, decay=1e-9), finish=None))
        else:
            train(run)
    whole, cut = (made.setting(tmp_path / name, steps=3) for name in ("whole", "cut"))
    for setting in (cut, whole):
        carried("flash", setting, **options)
    nets = [load_family(str(tmp_path / name / "model")).net for name in ("cut", "whole")]
    pairs = zip(*(net.parameters() for net in nets), strict=True)
    apart = max(float((p - q).abs().max()) for p, q in pairs)
    assert apart < 1e-3  # the rate's last steps differ, the draws do not
    assert (tmp_path / "whole" / "model" / "LICENSE").read_text() == "of the teacher"


def test_a_chain_has_its_folder_to_itself(made: Made, tmp_path: Path) -> None:
    chain = load_recipe("flash")(config=made.setting(tmp_path / "chain"), **RECIPES["flash"])
    next(chain)
    with pytest.raises(UserError, match="another --steps"):
        next(load_recipe("flash")(config=made.setting(tmp_path / "chain", steps=9), **RECIPES["flash"]))
    with pytest.raises(UserError, match="holds a run of distill-flash-chain"):
        train(load_recipe("trajectory")(config=made.setting(tmp_path / "chain")))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text('{"recipe": "distill-trajectory"}')
    with pytest.raises(UserError, match="holds a run of distill-trajectory"):
        next(load_recipe("flash")(config=made.setting(tmp_path / "one"), **RECIPES["flash"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        next(load_recipe("flash")(config=made.setting(tmp_path / "file"), **RECIPES["flash"]))


def test_without_dropout_the_student_hears_t5_and_with_it_sometimes(made: Made, tmp_path: Path) -> None:
    if load_family(str(made.teacher)).clip_length is None:  # FLUX cannot do without its T5
        run = load_recipe("trajectory")(config=made.setting(tmp_path, t5_dropout=1.0))
        batch = run.batches(0, WHOLE)
        assert batch.cond_without_t5 is None or batch.student_cond.context.shape == batch.cond.context.shape
        return
    runs = {
        share: load_recipe("trajectory")(config=made.setting(tmp_path, t5_dropout=share))
        for share in (0.0, 0.5, 1.0)
    }
    heard = {
        share: {run.batches(step, WHOLE).student_cond.context.shape[1] for step in range(12)}
        for share, run in runs.items()
    }
    assert heard[0.0] == {2 * tiny.LENGTH} and heard[1.0] == {tiny.LENGTH}
    assert heard[0.5] == heard[0.0] | heard[1.0]
    train(runs[0.0])
    assert load_family(str(tmp_path / "model")).parts["text_encoder_3"] is not None


def test_the_best_by_kid_to_the_teacher_is_kept(made: Made, tmp_path: Path) -> None:
    carried("trajectory", made.setting(tmp_path, validate_every=1))
    told = json.loads((tmp_path / "best/best.json").read_text())
    assert told["metric"] == "kid-t" and told["step"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"student_steps": 3}, "of no use to a student of 3"),
        ({"dtype": "bfloat16"}, "give a rank with --lora"),
        ({"init": "nosuch"}, "there is no model"),
        ({"lora": 2, "init": "nosuch"}, "cannot be read as a LoRA"),
    ],
)
def test_what_does_not_fit_is_one_line(
    made: Made, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load_recipe("trajectory")(config=made.setting(tmp_path, **options))
    assert "\n" not in str(caught.value)


def test_two_processes_carry_out_the_chain(made: Made, tmp_path: Path) -> None:
    """Sharded nets, features tapped from one that is frozen, three runs one after the other."""
    words = [
        "--steps",
        "1",
        "--warm-start-steps",
        "1",
        "--split-steps",
        "1",
        "--proxy-updates",
        "1",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    where = ["--teacher", str(made.teacher), "--samples", str(made.shards), "--output", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "fewstep", "distill", "flash", *words, *where], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    load_family(str(tmp_path / "run/model"))


def test_samples_of_another_family_are_refused(made: Made, tmp_path: Path) -> None:
    other = sd3.assemble(tiny.parts(tiny.SMALL | {"num_layers": 2}), name="other")
    sd3.save(other, tmp_path / "other")
    with pytest.raises(UserError, match="samples of another teacher"):
        load_recipe("dmd")(config=made.setting(tmp_path, teacher=str(tmp_path / "other")))
