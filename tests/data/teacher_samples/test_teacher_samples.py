"""Samples of a teacher: the same however they are made, true to it, read from anywhere, or refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
import tiny
import tiny_flux
from fewstep.core import guidance, sampling, schedule
from fewstep.core.progress import duration
from fewstep.core.types import Cond, Model, UserError
from fewstep.data import shards
from fewstep.data.teacher_samples import manifest
from fewstep.data.teacher_samples.manifest import NULL, PLAN, Plan
from fewstep.data.teacher_samples.progress import Ranks, progress_printer, ranks_from_env
from fewstep.data.teacher_samples.read import TeacherSamples
from fewstep.data.teacher_samples.write import write_samples
from fewstep.families import flux, sd3
from fewstep.families.base import Family
from fewstep.pipeline.loading import load_family
from mixture import Mixture, images

pytestmark = pytest.mark.slow(10)

PROMPTS = [f"a {word}" for word in ("cat", "dog", "pear", "kite", "sun", "red key", "blue sea")]


@pytest.fixture(scope="module")
def teacher() -> Family:
    return sd3.assemble(tiny.parts(), name="tiny", steps=6, guidance=3.0)


def plan_of(model: Model, **options: Any) -> Plan:
    clips = getattr(model, "clip_length", None)
    asked: dict[str, Any] = {"guidance": model.guidance, "steps": 4, "student_steps": 2, "seed": 5}
    return manifest.make(model, PROMPTS, **asked | {"per_shard": 3, "clip_length": clips} | options)


@pytest.fixture(scope="module")
def made(teacher: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_samples(teacher, PROMPTS, plan_of(teacher, pictures=True), folder, batch=2)
    return folder


def arrays(folder: Path) -> dict[str, bytes]:
    """Every file of every shard, by shard and name."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[f"{path.name}/{member.name}"] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def test_states_are_the_guided_teachers_own_walk(teacher: Family, made: Path) -> None:
    read = TeacherSamples.open(made)
    batch = read.read([4])
    assert read.times == pytest.approx(schedule.grid(2, teacher.shift))
    x = torch.from_numpy(sampling.noise(5 + 4, teacher.latent))[None]
    cond, null = teacher.text([PROMPTS[4]]), teacher.text([""])
    walked = [x]
    with torch.no_grad():
        for t, t_next in zip(schedule.grid(4)[:-1], schedule.grid(4)[1:], strict=True):
            at = torch.full((1,), t)
            away = teacher.velocity(x, at, null)
            x = x + (t_next - t) * (away + 3.0 * (teacher.velocity(x, at, cond) - away))
            walked.append(x)
    truth = torch.stack(walked[::2], 1)
    assert (truth[:, -1] - truth[:, 0]).abs().max() > 0.1  # it goes somewhere
    assert torch.allclose(batch.trajectory, truth, atol=3e-3)
    assert torch.equal(batch.latents, batch.trajectory[:, -1])


def test_conditions_are_the_text_encoders_and_do_without_t5_by_their_first_rows(
    teacher: Family, made: Path
) -> None:
    read = TeacherSamples.open(made)
    batch, alone = read.read([2, 6]), sd3.Text({**teacher.parts, "text_encoder_3": None})
    assert list(batch.prompts) == [PROMPTS[2], PROMPTS[6]]
    for told_, cond in (
        (batch.cond, teacher.text(batch.prompts)),
        (read.without_t5(batch.cond), alone(batch.prompts)),
        (read.null, teacher.text([""])),
        (read.without_t5(read.null), alone([""])),
    ):
        assert told_.context.shape == cond.context.shape
        assert torch.allclose(told_.context, cond.context, atol=2e-2)
        assert torch.allclose(told_.pooled, cond.pooled, atol=2e-2)
    assert read.plan.t5 and read.clip_length == tiny.LENGTH


def test_any_row_any_time_is_what_the_tars_hold(made: Path) -> None:
    read, files = TeacherSamples.open(made), arrays(made)
    rows = [6, 0, 3, 3, 5]
    batch = read.read(rows)
    for place, row in enumerate(rows):
        for kind, array in (
            ("states", batch.trajectory), ("context", batch.cond.context), ("pooled", batch.cond.pooled)
        ):  # fmt: skip
            data = files[f"synthetic-{row // 3:05d}.tar/{row:08d}.{kind}.npy"]
            assert np.array_equal(np.load(io.BytesIO(data)).astype(np.float32), array[place].numpy())
    assert all(a.dtype == torch.float32 for a in (batch.trajectory, batch.cond.context, batch.latents))
    with pytest.raises(IndexError):
        read.read([7])


def test_a_big_folder_is_not_loaded(teacher: Family, tmp_path: Path) -> None:
    import tracemalloc

    big = replace(teacher, latent=(4, 64, 64), velocity=lambda x, t, cond: 0 * x)
    write_samples(big, PROMPTS, plan_of(big, guidance=None), tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    tracemalloc.start()
    read = TeacherSamples.open(tmp_path)
    read.read([1])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < size / 10 and peak < size / 2
    assert len(read) == 7


def test_every_row_comes_once_an_epoch_and_not_in_the_same_order(made: Path) -> None:
    read = TeacherSamples.open(made)
    seen = [row for step in range(7) for row in read.rows(step, 2, seed=1)]
    first, second = seen[:7], seen[7:]
    assert sorted(first) == sorted(second) == list(range(7)) == list(range(len(read)))
    assert first != second
    assert [row for step in range(7) for row in read.rows(step, 2, seed=1)] == seen


def test_pictures_make_a_data_set_of_pictures(teacher: Family, made: Path) -> None:
    read = [example for path in shards.find(made) for example in shards.read(path)]
    assert [example.prompt for example in read] == PROMPTS
    assert read[3].truth["seed"] == 8 and read[3].truth["weights"] == ""
    with torch.no_grad():
        pixels = teacher.codec.decode(TeacherSamples.open(made).read([3]).latents)[0]
    drawn = np.asarray(read[3].image).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(drawn - pixels.clamp(-1, 1).numpy()).max() < 0.03


def test_interrupted_anywhere_it_ends_as_if_it_were_not(teacher: Family, made: Path, tmp_path: Path) -> None:
    plan, stops = plan_of(teacher, pictures=True), [1, 3, 3, 99]
    half = tmp_path / f".{plan.path(tmp_path, 2).stem}.123-dead.part.tar"
    half.write_bytes(b"of a killed process")
    for stop in stops:
        calls = iter(range(stop))

        def progress(done: int, total: int, calls: Any = calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        try:
            write_samples(teacher, PROMPTS, plan, tmp_path, batch=2, progress=progress)
        except KeyboardInterrupt:
            with pytest.raises(UserError, match=r"[0-2] of 3 shards are there; run the same"):
                TeacherSamples.open(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in made.iterdir())
    for path in made.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_there_is_not_made_again(teacher: Family, made: Path) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("walked again")

    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    write_samples(replace(teacher, velocity=never), PROMPTS, plan_of(teacher, pictures=True), made)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_another_batch_gives_the_same_within_rounding(teacher: Family, made: Path, tmp_path: Path) -> None:
    write_samples(teacher, PROMPTS, plan_of(teacher, pictures=True), tmp_path, batch=7)
    one, other = (TeacherSamples.open(folder).read(range(7)) for folder in (made, tmp_path))
    assert torch.allclose(one.trajectory, other.trajectory, atol=4e-3)
    assert torch.allclose(one.cond.context, other.cond.context, atol=4e-3)


def test_two_processes_of_the_command_make_what_one_function_makes(teacher: Family, tmp_path: Path) -> None:
    sd3.save(teacher, tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    command = [
        sys.executable,
        "-m",
        "fewstep",
        "sample-teacher",
        "--prompts",
        "prompts.txt",
        "--num-samples",
        "5",
    ]
    command += ["--teacher", "teacher", "--steps", "2", "--per-shard", "1", "--guidance", "2"]
    source = str(Path(fewstep.__file__).parents[1])
    both = [
        subprocess.Popen(
            [*command, "--output", out],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": source, "RANK": rank, "WORLD_SIZE": world},
            stderr=subprocess.PIPE,
        )
        for out, rank, world in (("two", "0", "2"), ("two", "1", "2"))
    ]
    ends = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    plan = manifest.read(tmp_path / "two")
    write_samples(teacher.with_guidance(2.0), [*PROMPTS[:3], *PROMPTS[:2]], plan, tmp_path / "one")
    assert arrays(tmp_path / "one") == arrays(tmp_path / "two")
    one = TeacherSamples.open(tmp_path / "two")
    assert one.prompts == [*PROMPTS[:3], *PROMPTS[:2]]
    assert one.read([0]).trajectory is None and one.times == [0.0]
    assert not torch.equal(*one.read([0, 3]).latents)  # the same prompt, another noise
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        NULL, PLAN, *(f"synthetic-{k:05d}.tar" for k in range(5))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"guidance": 2.0}, "guidance 3.0 there, 2.0 now"),
        ({"steps": 6}, "steps 4 there, 6 now"),
        ({"weights": "abc", "seed": 6}, "weights  there, abc now; seed 5 there, 6 now"),
        ({"student_steps": 0}, "student_steps 2 there, 0 now"),
        ({"pictures": False}, "pictures True there, False now"),
    ],
)
def test_a_folder_of_another_plan_is_refused(
    teacher: Family, made: Path, changed: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as told_:
        write_samples(teacher, PROMPTS, plan_of(teacher, **{"pictures": True} | changed), made)
    assert line in str(told_.value) and "choose another folder" in str(told_.value)


@pytest.mark.parametrize("name", ["synthetic-00000.tar", "synthetic-00099.tar", "null.npz"])
def test_what_we_did_not_make_is_not_taken_for_ours(teacher: Family, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"of somebody else")
    with pytest.raises(UserError, match=f"{name} was not made by fewstep sample-teacher"):
        write_samples(teacher, PROMPTS, plan_of(teacher), tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"of somebody else"]


def test_a_teacher_is_known_by_its_weights_whatever_its_folder_is_called(
    teacher: Family, tmp_path: Path
) -> None:
    write_samples(teacher, PROMPTS, plan_of(teacher, weights="abc"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "synthetic-00001.tar").unlink()
    renamed = replace(teacher, name="elsewhere/tiny")
    write_samples(renamed, PROMPTS, plan_of(renamed, weights="abc"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for other, line in (("abd", "weights abc there, abd now"), ("", "weights abc there")):
        with pytest.raises(UserError, match=line):
            write_samples(renamed, PROMPTS, plan_of(renamed, weights=other), tmp_path)


def test_without_a_fingerprint_the_name_tells_teachers_apart(teacher: Family, made: Path) -> None:
    other = replace(teacher, name="another")
    with pytest.raises(UserError, match="teacher tiny there, another now"):
        write_samples(other, PROMPTS, plan_of(other, pictures=True), made)


def test_other_captions_are_refused(teacher: Family, made: Path) -> None:
    plan = plan_of(teacher, pictures=True)
    with pytest.raises(UserError, match="not the plan's"):
        write_samples(teacher, PROMPTS[::-1], plan, made)
    other = manifest.make(teacher, PROMPTS[::-1], guidance=3.0, steps=4, student_steps=2, seed=5, per_shard=3)
    with pytest.raises(UserError, match="captions"):
        write_samples(teacher, PROMPTS[::-1], other, made)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20_000])


def without(ending: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        files = {k: v for k, v in arrays(path.parent).items() if k.startswith(path.name)}
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                if not name.endswith(ending):
                    shards.add_file(tar, name.split("/")[1], data)

    return change


def planned(**changes: Any) -> Callable[[Path], object]:
    """A plan that says other numbers."""

    def change(path: Path) -> None:
        note = path.parent / PLAN
        note.write_text(json.dumps({**json.loads(note.read_text()), **changes}))

    return change


def empty(path: Path) -> None:
    tarfile.open(path, "w").close()


def foreign(path: Path) -> None:
    files = {k: v for k, v in arrays(path.parent).items() if k.startswith(path.name)}
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4, 16, 16), np.float16))
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            shards.add_file(tar, name.split("/")[1], file.getvalue() if ".states" in name else data)


def single(path: Path) -> None:
    """As many bytes of another kind."""
    files = {k: v for k, v in arrays(path.parent).items() if k.startswith(path.name)}
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4, 8, 4), np.float32))
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            shards.add_file(tar, name.split("/")[1], file.getvalue() if ".states" in name else data)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (cut, "cut short or not of this plan"),
        (lambda path: path.write_bytes(b""), "cut short or not of this plan"),
        (empty, "is empty"),
        (without("4.txt"), "00000004 has no caption"),
        (without("4.pooled.npy"), "00000004.pooled.npy is missing"),
        (foreign, "00000003.states.npy is not of shape (3, 4, 8, 8)"),
        (single, "states are float32 (3, 4, 8, 4), not float16 (3, 4, 8, 8)"),
        (lambda path: path.unlink(), "2 of 3 shards are there; run the same fewstep sample-teacher again"),
        (lambda path: (path.parent / PLAN).write_text("{"), "plan.json is damaged"),
        (lambda path: (path.parent / PLAN).write_text('{"layout": 0}'), "plan.json is of layout 0"),
        (planned(number=10**9, per_shard=1), "3 of 1000000000 shards are there"),
        (planned(number=10**12), "number: expected int <="),
        (planned(steps=10**9), "steps: expected int <="),
        (planned(latent=[2**20, 2**20, 2**20]), "samples of more than"),
        (planned(latent=[4, 8]), "not of this plan"),
        (planned(shift=0), "shift: expected float >="),
        (planned(more=1), "more is no entry of a plan"),
        (lambda path: (path.parent / PLAN).unlink(), "make samples there with: fewstep sample-teacher"),
        (lambda path: (path.parent / NULL).write_bytes(b"PK"), "null.npz is missing or broken"),
    ],
)
def test_a_bad_folder_is_one_line(
    made: Path, tmp_path: Path, change: Callable[[Path], Any], line: str
) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "synthetic-00001.tar"
    change(broken)
    with pytest.raises(UserError) as told_:
        TeacherSamples.open(tmp_path)
    message = str(told_.value)
    assert line in message and "\n" not in message
    assert "fewstep sample-teacher" in message or "again" in message


@pytest.mark.parametrize("kind", tiny_flux.KINDS)
def test_guidance_that_is_embedded_gets_no_second_pass(kind: str, tmp_path: Path) -> None:
    model = flux.assemble(tiny_flux.parts(kind), name=kind, steps=2, side=4)
    if kind == "schnell":
        with pytest.raises(UserError, match="takes no guidance"):
            model.with_guidance(2.0)
    else:
        model = model.with_guidance(2.0)
    rows: list[int] = []

    def counted(x: Any, t: Any, cond: Cond) -> Any:
        rows.append(len(x))
        return model.velocity(x, t, cond)

    plan = plan_of(model, guidance=model.embedded_guidance)
    write_samples(replace(model, velocity=counted), PROMPTS, plan, tmp_path, batch=4)
    assert rows == [3] * 8 + [1] * 4
    read = TeacherSamples.open(tmp_path)
    assert (read.clip_length, read.plan.t5) == (None, True)
    assert read.plan.guidance == (2.0 if kind == "dev" else None)
    cond = read.read([1]).cond
    assert read.without_t5(cond).context.shape == cond.context.shape
    x = torch.from_numpy(sampling.noise(6, model.latent))[None]
    with torch.no_grad():
        end = sampling.sample_flow(model.velocity, x, schedule.grid(4, model.shift), model.text([PROMPTS[1]]))
    assert torch.allclose(read.read([1]).latents, end, atol=4e-3)


def test_a_family_that_needs_t5_cannot_leave_it_out(tmp_path: Path) -> None:
    flux.save(flux.assemble(tiny_flux.parts("dev"), name="dev", side=4), tmp_path / "dev")
    assert load_family(str(tmp_path / "dev")).embedded_guidance == flux.GUIDANCE
    with pytest.raises(UserError, match="always reads with T5"):
        load_family(str(tmp_path / "dev"), t5=False)


def test_on_the_mixture_the_states_are_those_of_a_finer_walk_and_guidance_sharpens(tmp_path: Path) -> None:
    truth = images()

    def text(prompts: Any) -> Cond:
        said = [truth.cond(1, None if p == "" else 2).map(torch.from_numpy) for p in prompts]
        return Cond(torch.cat([c.context for c in said]), torch.cat([c.pooled for c in said]))

    model = mixture_model(truth, text)
    write_samples(model, PROMPTS, plan_of(model, guidance=1.0, steps=64), tmp_path / "plain")
    latents = TeacherSamples.open(tmp_path / "plain").read(range(7)).latents
    assert np.abs(latents.numpy() - truth.means[2]).max() < 4 * 0.2
    write_samples(model, PROMPTS, plan_of(model, guidance=3.0, steps=64), tmp_path / "guided")
    read = TeacherSamples.open(tmp_path / "guided")
    assert read.plan.guidance == 3.0
    pair = guidance.Guided(truth, text([""]), 3.0)
    x = torch.from_numpy(sampling.batch_noise(range(5, 12), (2, 4, 4)))
    fine = sampling.sample_flow(pair, x, schedule.grid(512), text(PROMPTS))
    assert (read.read(range(7)).latents - fine).abs().max() < 0.1
    assert (read.read(range(7)).latents - latents).abs().max() > 0.1


def mixture_model(truth: Mixture, text: Any) -> Model:
    return Model(
        name="mixture",
        velocity=truth,
        text=text,
        codec=None,  # type: ignore[arg-type]  # these points have no pixels
        latent=(2, 4, 4),
        downscale=1,
        shift=3.0,
        steps=64,
        guidance=1.0,
        from_numpy=torch.from_numpy,
        to_numpy=lambda x: x.numpy(),
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 28, "student_steps": 3}, "28 steps do not divide into 3 steps of the student; take 27"),
        ({"steps": 2, "student_steps": 4}, "take 4 steps"),
        ({"steps": 0}, "at least 1"),
        ({"seed": 2**64 - 6}, "seeds lie between 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(teacher: Family, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        plan_of(teacher, **options)


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_walks_that_half_precision_does_not_hold_are_refused(
    teacher: Family, tmp_path: Path, value: float
) -> None:
    wild = replace(teacher, velocity=lambda x, t, cond: 0 * x + value)
    with pytest.raises(UserError, match="trajectory from seed 5 grows to"):
        write_samples(wild, PROMPTS, plan_of(teacher), tmp_path)
    assert not list(tmp_path.glob("*.tar"))


def test_ranks_come_from_the_environment() -> None:
    assert ranks_from_env({}) == Ranks(0, 1, 0)
    assert ranks_from_env({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}) == Ranks(9, 16, 1)
    for rank, world in (("2", "2"), ("-1", "2"), ("one", "2")):
        with pytest.raises(UserError, match="is not valid"):
            ranks_from_env({"RANK": rank, "WORLD_SIZE": world})


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    say = progress_printer(every=0.0)
    for done in (4, 6, 8):
        say(done, 8)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fewstep: 4 of 8 samples are there"
    assert "6 of 8 samples" in lines[1] and lines[2].endswith(" per second, 0 s left")
    assert [duration(s) for s in (44, 800, 12_000)] == ["44 s", "13 min", "3 h 20 min"]


def test_a_plan_comes_back_as_it_was(teacher: Family, made: Path) -> None:
    assert manifest.read(made) == plan_of(teacher, pictures=True)
    assert json.loads((made / PLAN).read_text())["clip_length"] == tiny.LENGTH
