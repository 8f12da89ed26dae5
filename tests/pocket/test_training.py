"""All recipes in a chain on a tiny data set, up to a student that diffusers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import tiny_stickers

from fewstep.core import sampling, schedule
from fewstep.core.atomic import replacing_folder
from fewstep.core.prompt_text import PromptWarning
from fewstep.core.types import WHOLE, UserError
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.write import write_samples
from fewstep.distill.config import DistillConfig
from fewstep.distill.recipes.trajectory import recipe as trajectory
from fewstep.families import sd3
from fewstep.families.common import fingerprint
from fewstep.pocket import assemble, train_teacher, train_text
from fewstep.pocket import config as pocket
from fewstep.pocket.train_paraphrases import pocket_paraphrases
from fewstep.pocket.train_teacher import pocket_teacher
from fewstep.pocket.train_text import pocket_text
from fewstep.pocket.train_vae import pocket_vae
from fewstep.train.checkpoint import last_step
from fewstep.train.trainer import train

pytestmark = pytest.mark.slow(15)


@dataclass(frozen=True)
class Chain:
    """Folders of the data and of the models that the chain of recipes wrote."""

    data: Path
    codec: Path
    text: Path
    teacher: Path
    student: Path


@pytest.fixture(scope="module", autouse=True)
def small_run() -> Iterator[None]:
    """A shallow MMDiT and short contact sheets: most of a tiny run's time would go to them."""
    full = pocket.transformer

    def shallow() -> Any:
        net = full()
        return type(net).from_config({**net.config, "num_layers": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "transformer", shallow)
        for recipe in (train_teacher, train_text):
            patch.setattr(recipe, "SHOWN", recipe.SHOWN[:1])
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, small_run: None) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    chain = Chain(tiny_stickers.make(root / "data"), *(root / n / "model" for n in ("c", "x", "t", "s")))
    train(pocket_vae(data=chain.data, output=root / "c", steps=2, batch_size=2, num_images=8))
    train(pocket_text(data=chain.data, output=root / "x", steps=2, batch_size=8, words=20, codec=chain.codec))
    train(teacher(chain, 1))
    train(teacher(chain, 2))
    train(student(chain, steps=2))
    return chain


def teacher(chain: Chain, steps: int) -> Any:
    return pocket_teacher(
        data=chain.data,
        output=chain.teacher.parent,
        codec=chain.codec,
        text=chain.text,
        steps=steps,
        batch_size=4,
    )


def student(chain: Chain, **options: Any) -> Any:
    made = {} if "samples" in options else {"num_samples": 4, "guidance": 2.0, "data": chain.data}
    options = {"batch_size": 4} | made | options
    return trajectory(
        config=DistillConfig(teacher=str(chain.teacher), output=chain.student.parent, **options)
    )


def test_student_generates_what_diffusers_generates(chain: Chain) -> None:
    from diffusers import StableDiffusion3Pipeline

    family = sd3.load(chain.student, t5=False)
    assert (family.name, family.steps, family.guidance) == ("pocket-teacher-trajectory", 4, None)
    noise = sampling.batch_noise([5], family.latent)
    with torch.no_grad():
        cond = family.text(["a red disc"])
        grid = schedule.grid(4, family.shift)
        ours = family.codec.decode(
            sampling.sample_flow(family.velocity, family.from_numpy(noise), grid, cond)
        )
    assert ours.std() > 0.01
    pipeline = StableDiffusion3Pipeline.from_pretrained(chain.student, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red disc",
        latents=torch.from_numpy(noise),
        height=128,
        width=128,
        sigmas=[1.0, 0.75, 0.5, 0.25],  # the scheduler shifts them to 1, 0.9, 0.75, 0.5
        guidance_scale=1.0,
        max_sequence_length=0,  # no rows of zeros where T5's tokens would be
        output_type="pt",
    ).images
    error = (theirs - (ours / 2 + 0.5).clamp(0, 1)).square().mean()
    assert -10 * torch.log10(error) >= 45


def test_teacher_includes_t5_and_its_codec(chain: Chain) -> None:
    family = sd3.load(chain.teacher)
    assert family.parts["text_encoder_3"] is not None
    config = json.loads((chain.codec / "config.json").read_text())
    assert family.parts["vae"].config.scaling_factor == config["scaling_factor"] != 1.0
    latents = np.concatenate([np.load(p)["latents"] for p in sorted(chain.data.glob("latents/*/*.npz"))])
    assert latents.shape == (24, *family.latent)
    assert abs(float(latents.astype(np.float32).std()) - 1) < 0.3  # the finished codec scales them to 1


def test_a_teacher_trains_with_encoders_of_pocket_paraphrases(chain: Chain, tmp_path: Path) -> None:
    train(
        pocket_paraphrases(
            init=chain.teacher,
            data=chain.data,
            output=tmp_path / "w",
            steps=2,
            batch_size=6,
            words=20,
            num_pairs=40,
        )
    )
    options: dict[str, Any] = {"data": chain.data, "init": chain.teacher, "text": tmp_path / "w" / "model"}
    train(pocket_teacher(output=tmp_path / "t", steps=1, batch_size=2, keep_t5=0, **options))
    assert sd3.load(tmp_path / "t" / "model").steps == 28


def test_a_finished_run_continues_with_more_steps(chain: Chain) -> None:
    run = chain.teacher.parent
    assert last_step(run) == 2
    assert [path.stem for path in sorted((run / "sheets").glob("*.png"))] == ["0000001", "0000002"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(np.isfinite(line["flow"]) for line in log)


def test_a_teacher_starts_from_another(chain: Chain, tmp_path: Path) -> None:
    run = pocket_teacher(
        data=chain.data / "train", output=tmp_path, init=chain.teacher, steps=1, batch_size=2
    )
    before = sd3.load(chain.teacher).net.state_dict()
    now = run.method.nets["net"].state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_encoders_start_from_others_and_a_teacher_trains_with_them(chain: Chain, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": chain.data, "codec": chain.codec, "batch_size": 8, "words": 20}
    run = pocket_text(output=tmp_path / "x", init=chain.teacher, steps=1, **options)
    before, clips = sd3.load(chain.teacher), run.method.nets["student"].clips
    for part, clip in zip(("text_encoder", "text_encoder_2"), clips, strict=True):
        old, new = before.parts[part].state_dict(), clip.state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old)
    train(run)
    run = pocket_teacher(
        data=chain.data,
        output=tmp_path / "t",
        init=chain.teacher,
        text=tmp_path / "x/model",
        steps=1,
        batch_size=2,
    )
    train(run)
    after = sd3.load(tmp_path / "t/model")
    kept = assemble.load_text_encoders(tmp_path / "x/model")[0].state_dict()
    assert all(torch.equal(value, kept[n]) for n, value in after.parts["text_encoder"].state_dict().items())
    assert not torch.equal(after.text(["a disc"]).pooled, before.text(["a disc"]).pooled)


def test_an_mmdit_of_another_text_width_is_refused(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.teacher, tmp_path / "other")
    net = pocket.transformer()
    narrow = type(net).from_config({**net.config, "joint_attention_dim": 64})
    narrow.save_pretrained(tmp_path / "other/transformer")
    with pytest.raises(UserError, match="reads text of width 64, but gets 384"):
        pocket_teacher(data=chain.data, output=tmp_path, init=tmp_path / "other", steps=1, batch_size=2)


def test_an_mmdit_of_other_latents_is_refused(chain: Chain, tmp_path: Path) -> None:
    vae = pocket.autoencoder()
    small = type(vae).from_config({**vae.config, "latent_channels": 4})
    small.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="reads latents of width 16, but gets 4"):
        pocket_teacher(
            data=chain.data,
            output=tmp_path,
            init=chain.teacher,
            codec=tmp_path / "vae",
            steps=1,
            batch_size=2,
        )


def test_resuming_encoders_with_another_vocabulary_is_refused(chain: Chain, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": chain.data,
        "codec": chain.codec,
        "batch_size": 8,
        "words": 20,
        "steps": 1,
    }
    train(pocket_text(output=tmp_path / "x", **options))
    other = tmp_path / "other"
    shutil.copytree(chain.teacher, other)
    pocket.byte_tokenizer().save_pretrained(other / "tokenizer")
    with pytest.raises(UserError, match="another vocabulary"):
        train(pocket_text(output=tmp_path / "x", init=other, **options))


def test_the_decoder_alone_keeps_latents_valid(chain: Chain, tmp_path: Path) -> None:
    run = pocket_vae(
        data=chain.data,
        output=tmp_path,
        init=chain.codec,
        steps=2,
        batch_size=2,
        num_images=8,
        decoder_only=True,
    )
    before = {n: p.clone() for n, p in run.method.nets["vae"].named_parameters()}
    train(run)
    after = assemble.load_vae(tmp_path / "model")
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert after.config.scaling_factor == assemble.load_vae(chain.codec).config.scaling_factor


def test_samples_of_an_earlier_teacher_are_refused(chain: Chain, tmp_path: Path) -> None:
    other = sd3.load(chain.teacher)
    with torch.no_grad():
        other.net.proj_out.bias.add_(0.1)
    sd3.save(other, tmp_path / "model")
    with pytest.raises(UserError, match=r"made by another plan \(weights \w+ there, \w+ now\)"):
        student(replace(chain, teacher=tmp_path / "model"), steps=2)


def test_two_step_student_trains_on_the_same_samples(chain: Chain, tmp_path: Path) -> None:
    run = student(
        replace(chain, student=tmp_path / "model"), student_steps=2, samples=chain.student.parent / "walks"
    )
    batch = run.batches(0, WHOLE)
    assert batch.trajectory.shape == (4, 3, *sd3.load(chain.teacher).latent)
    four = student(chain).batches(0, WHOLE).trajectory
    assert torch.equal(batch.trajectory, four[:, [0, 2, 4]])
    assert not batch.trajectory.requires_grad


@pytest.mark.parametrize(("steps", "message"), [(0, "latents alone"), (3, "trajectories at 3 steps")])
def test_unusable_samples_are_refused(chain: Chain, tmp_path: Path, steps: int, message: str) -> None:
    family = sd3.load(chain.teacher, t5=False)
    weights = fingerprint(family.net)
    plan = manifest.make(family, ["a"], guidance=2.0, steps=3, student_steps=steps, weights=weights)
    write_samples(family, ["a"], plan, tmp_path / "shards")
    with pytest.raises(UserError, match=message):
        student(replace(chain, student=tmp_path / "model"), samples=tmp_path / "shards")
    with pytest.raises(UserError, match="samples of another teacher, pocket-teacher"):
        other = sd3.load(chain.teacher)
        with torch.no_grad():
            other.net.proj_out.bias.add_(0.1)
        sd3.save(other, tmp_path / "other")
        student(replace(chain, teacher=tmp_path / "other"), samples=tmp_path / "shards")


def test_a_failed_write_keeps_the_old_folder(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(OSError), replacing_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("second")
        raise OSError
    assert (tmp_path / "model" / "a").read_text() == "first"


def test_captions_with_unknown_words_are_warned_about() -> None:
    from transformers import AutoTokenizer

    from fewstep.pocket.config import byte_tokenizer
    from fewstep.pocket.train_teacher import _warn_about_unknown_words

    pocket = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models/pocket-teacher/tokenizer")
    captions = ["a red apple", "красное яблоко", "rote Äpfel auf dem Tisch", "a cat"]
    with pytest.warns(PromptWarning, match="^2 of 4 captions .* may not know: красное, яблоко$"):
        _warn_about_unknown_words(pocket, captions)
    _warn_about_unknown_words(pocket, captions[::3])
    _warn_about_unknown_words(byte_tokenizer(), captions)  # it encodes any text as bytes
