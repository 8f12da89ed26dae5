"""Every recipe on a tiny data set, one after the other, to a student that stock diffusers draws with."""

from __future__ import annotations

import json
import shutil
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
from fewstep.pocket import assemble
from fewstep.pocket import config as pocket
from fewstep.pocket.train_paraphrases import pocket_paraphrases
from fewstep.pocket.train_teacher import pocket_teacher
from fewstep.pocket.train_text import pocket_text
from fewstep.pocket.train_vae import pocket_vae
from fewstep.train.checkpoint import last_step
from fewstep.train.trainer import train


@dataclass(frozen=True)
class Made:
    """Where the chain of recipes left its models."""

    data: Path
    codec: Path
    text: Path
    teacher: Path
    student: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("chain")
    all_ = Made(tiny_stickers.make(root / "data"), *(root / n / "model" for n in ("c", "x", "t", "s")))
    train(pocket_vae(data=all_.data, output=root / "c", steps=2, batch_size=2, num_images=8))
    train(pocket_text(data=all_.data, output=root / "x", steps=2, batch_size=8, words=20, codec=all_.codec))
    train(teacher(all_, 1))
    train(teacher(all_, 2))
    train(student(all_, steps=2))
    return all_


def teacher(made: Made, steps: int) -> Any:
    return pocket_teacher(
        data=made.data,
        output=made.teacher.parent,
        codec=made.codec,
        text=made.text,
        steps=steps,
        batch_size=4,
    )


def student(made: Made, **options: Any) -> Any:
    options = {"num_samples": 4, "batch_size": 4, "guidance": 2.0} | options
    return trajectory(
        config=DistillConfig(teacher=str(made.teacher), data=made.data, output=made.student.parent, **options)
    )


def test_the_student_draws_as_stock_diffusers_does(made: Made) -> None:
    from diffusers import StableDiffusion3Pipeline

    family = sd3.load(made.student, t5=False)
    assert (family.name, family.steps, family.guidance) == ("pocket-teacher-trajectory", 4, None)
    noise = sampling.batch_noise([5], family.latent)
    with torch.no_grad():
        cond = family.text(["a red disc"])
        grid = schedule.grid(4, family.shift)
        ours = family.codec.decode(
            sampling.sample_flow(family.velocity, family.from_numpy(noise), grid, cond)
        )
    assert ours.std() > 0.01
    stock = StableDiffusion3Pipeline.from_pretrained(made.student, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a red disc",
        latents=torch.from_numpy(noise),
        height=128,
        width=128,
        sigmas=[1.0, 0.75, 0.5, 0.25],  # stock shifts them itself: 1, .9, .75, .5
        guidance_scale=1.0,
        max_sequence_length=0,  # no rows of zeros where T5's tokens would be
        output_type="pt",
    ).images
    error = (theirs - (ours / 2 + 0.5).clamp(0, 1)).square().mean()
    assert -10 * torch.log10(error) >= 45


def test_the_teacher_keeps_t5_and_its_codec(made: Made) -> None:
    family = sd3.load(made.teacher)
    assert family.parts["text_encoder_3"] is not None
    config = json.loads((made.codec / "config.json").read_text())
    assert family.parts["vae"].config.scaling_factor == config["scaling_factor"] != 1.0
    latents = np.concatenate([np.load(p)["latents"] for p in sorted(made.data.glob("latents/*/*.npz"))])
    assert latents.shape == (24, *family.latent)
    assert abs(float(latents.astype(np.float32).std()) - 1) < 0.3  # what the finished codec scales them to


def test_words_leave_encoders_that_a_teacher_takes(made: Made, tmp_path: Path) -> None:
    train(
        pocket_paraphrases(
            init=made.teacher,
            data=made.data,
            output=tmp_path / "w",
            steps=2,
            batch_size=6,
            words=20,
            num_pairs=40,
        )
    )
    options: dict[str, Any] = {"data": made.data, "init": made.teacher, "text": tmp_path / "w" / "model"}
    train(pocket_teacher(output=tmp_path / "t", steps=1, batch_size=2, keep_t5=0, **options))
    assert sd3.load(tmp_path / "t" / "model").steps == 28


def test_a_finished_run_went_on_when_asked_for_more(made: Made) -> None:
    run = made.teacher.parent
    assert last_step(run) == 2
    assert [path.stem for path in sorted((run / "sheets").glob("*.png"))] == ["0000001", "0000002"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(np.isfinite(line["flow"]) for line in log)


def test_a_teacher_goes_on_from_another(made: Made, tmp_path: Path) -> None:
    run = pocket_teacher(data=made.data / "train", output=tmp_path, init=made.teacher, steps=1, batch_size=2)
    before = sd3.load(made.teacher).net.state_dict()
    now = run.method.nets["net"].state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_encoders_go_on_from_anothers_and_a_teacher_takes_them(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": made.data, "codec": made.codec, "batch_size": 8, "words": 20}
    run = pocket_text(output=tmp_path / "x", init=made.teacher, steps=1, **options)
    before, clips = sd3.load(made.teacher), run.method.nets["student"].clips
    for part, clip in zip(("text_encoder", "text_encoder_2"), clips, strict=True):
        old, new = before.parts[part].state_dict(), clip.state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old)
    train(run)
    taught = pocket_teacher(
        data=made.data,
        output=tmp_path / "t",
        init=made.teacher,
        text=tmp_path / "x/model",
        steps=1,
        batch_size=2,
    )
    train(taught)
    after = sd3.load(tmp_path / "t/model")
    kept = assemble.load_text_encoders(tmp_path / "x/model")[0].state_dict()
    assert all(torch.equal(value, kept[n]) for n, value in after.parts["text_encoder"].state_dict().items())
    assert not torch.equal(after.text(["a disc"]).pooled, before.text(["a disc"]).pooled)


def test_an_mmdit_that_reads_other_text_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.teacher, tmp_path / "other")
    net = pocket.transformer()
    narrow = type(net).from_config({**net.config, "joint_attention_dim": 64})
    narrow.save_pretrained(tmp_path / "other/transformer")
    with pytest.raises(UserError, match="reads text of width 64, but gets 384"):
        pocket_teacher(data=made.data, output=tmp_path, init=tmp_path / "other", steps=1, batch_size=2)


def test_an_mmdit_of_other_latents_is_refused(made: Made, tmp_path: Path) -> None:
    vae = pocket.autoencoder()
    small = type(vae).from_config({**vae.config, "latent_channels": 4})
    small.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="reads latents of width 16, but gets 4"):
        pocket_teacher(
            data=made.data, output=tmp_path, init=made.teacher, codec=tmp_path / "vae", steps=1, batch_size=2
        )


def test_encoders_of_another_vocabulary_do_not_go_on(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": made.data,
        "codec": made.codec,
        "batch_size": 8,
        "words": 20,
        "steps": 1,
    }
    train(pocket_text(output=tmp_path / "x", **options))
    other = tmp_path / "other"
    shutil.copytree(made.teacher, other)
    pocket.byte_tokenizer().save_pretrained(other / "tokenizer")
    with pytest.raises(UserError, match="another vocabulary"):
        train(pocket_text(output=tmp_path / "x", init=other, **options))


def test_the_decoder_alone_keeps_latents_valid(made: Made, tmp_path: Path) -> None:
    run = pocket_vae(
        data=made.data,
        output=tmp_path,
        init=made.codec,
        steps=2,
        batch_size=2,
        num_images=8,
        decoder_only=True,
    )
    before = {n: p.clone() for n, p in run.method.nets["vae"].named_parameters()}
    train(run)
    after = assemble.load_vae(tmp_path / "model")
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(name.startswith("decoder.") for name in moved)
    assert after.config.scaling_factor == assemble.load_vae(made.codec).config.scaling_factor


def test_walks_of_an_earlier_teacher_are_refused(made: Made, tmp_path: Path) -> None:
    other = sd3.load(made.teacher)
    with torch.no_grad():
        other.net.proj_out.bias.add_(0.1)
    sd3.save(other, tmp_path / "model")
    with pytest.raises(UserError, match=r"made by another plan \(weights \w+ there, \w+ now\)"):
        student(replace(made, teacher=tmp_path / "model"), steps=2)


def test_two_steps_learn_from_the_same_walks(made: Made, tmp_path: Path) -> None:
    run = student(
        replace(made, student=tmp_path / "model"), student_steps=2, samples=made.student.parent / "walks"
    )
    batch = run.batches(0, WHOLE)
    assert batch.states.shape == (4, 3, *sd3.load(made.teacher).latent)
    four = student(made).batches(0, WHOLE).states
    assert torch.equal(batch.states, four[:, [0, 2, 4]])
    assert not batch.states.requires_grad


@pytest.mark.parametrize(("steps", "told"), [(0, "latents alone"), (3, "trajectories at 3 steps")])
def test_walks_that_are_of_no_use_are_refused(made: Made, tmp_path: Path, steps: int, told: str) -> None:
    family = sd3.load(made.teacher, t5=False)
    weights = fingerprint(family.net)
    plan = manifest.make(family, ["a"], guidance=2.0, steps=3, student_steps=steps, weights=weights)
    write_samples(family, ["a"], plan, tmp_path / "shards")
    with pytest.raises(UserError, match=told):
        student(replace(made, student=tmp_path / "model"), samples=tmp_path / "shards")
    with pytest.raises(UserError, match="samples of another teacher, pocket-teacher"):
        made_of_noise = sd3.load(made.teacher)
        with torch.no_grad():
            made_of_noise.net.proj_out.bias.add_(0.1)
        sd3.save(made_of_noise, tmp_path / "other")
        student(replace(made, teacher=tmp_path / "other"), samples=tmp_path / "shards")


def test_what_is_written_is_whole_or_what_it_was(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(OSError), replacing_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("second")
        raise OSError
    assert (tmp_path / "model" / "a").read_text() == "first"


def test_captions_that_the_tokenizer_cannot_read_are_told() -> None:
    from transformers import AutoTokenizer

    from fewstep.pocket.config import byte_tokenizer
    from fewstep.pocket.train_teacher import _warn_of_unknown

    pocket = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models/pocket-teacher/tokenizer")
    captions = ["a red apple", "красное яблоко", "rote Äpfel auf dem Tisch", "a cat"]
    with pytest.warns(PromptWarning, match="^2 of 4 captions .* may not know: красное, яблоко$"):
        _warn_of_unknown(pocket, captions)
    _warn_of_unknown(pocket, captions[::3])
    _warn_of_unknown(byte_tokenizer(), captions)  # all is bytes to it
