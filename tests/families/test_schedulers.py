"""What a scheduler folder says is followed as stock diffusers follows it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fewstep
import tiny
import tiny_flux
from fewstep.core import sampling, schedule
from fewstep.core.types import UserError
from fewstep.export.common import sd3_keys
from fewstep.families import flux, schedulers, sd3
from fewstep.families.diffusers_io import name_of
from fewstep.families.registry import built_in
from fewstep.inference.load import load as load_staged
from fewstep.inference.options import TorchOptions
from fewstep.pipeline.loading import load_family

pytestmark = pytest.mark.slow(5)

EULER, LCM = schedulers.EULER, schedulers.CONSISTENCY
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.8, "max_shift": 2.0, "base_image_seq_len": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("schedules")
    sd3.save(sd3.assemble(tiny.original(), name="base", steps=3, guidance=None), place / "sd3")
    flux.save(flux.assemble(tiny_flux.parts("dev"), name="base", steps=3, side=8), place / "flux")
    return {kind: place / kind for kind in ("sd3", "flux")}


def said(base: Path, place: Path, kind: str = EULER, index: str | None = None, **settings: Any) -> Path:
    """A copy of ``base`` whose scheduler folder says so."""
    shutil.copytree(base, place)
    path = place / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.42.1", **settings}))
    path = place / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": ["diffusers", index or kind]}))
    return place


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Karras": (EULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
    "exponential": (EULER, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    "beta": (EULER, {"use_beta_sigmas": True}, "use_beta_sigmas"),
    "inverted": (EULER, {"invert_sigmas": True}, "invert_sigmas"),
    "a terminal shift": (EULER, {"shift_terminal": 0.1}, "shift_terminal"),
    "other training times": (EULER, {"num_train_timesteps": 500}, "num_train_timesteps"),
    "no training times": (EULER, {"num_train_timesteps": 0}, "num_train_timesteps"),
    "a setting of another version": (EULER, {"use_laplace_sigmas": True}, "use_laplace_sigmas"),
    "scales": (LCM, {"scale_factors": [0.5, 1]}, "scale_factors"),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "FlowMatchHeun"),
    "UniPC": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, "UniPC"),
    "DPM++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "DPMSolver"),
    "no class": ("NoSuchScheduler", {}, "NoSuchScheduler"),
    "a shift of text": (EULER, {"shift": "3"}, "shift"),
    "no shift": (EULER, {"shift": 0}, "shift"),
    "an unknown kind of shift": (EULER, {"time_shift_type": "cubic"}, "time_shift_type"),
    "a line through one point": (EULER, {**DYNAMIC, "max_image_seq_len": 4}, "same number"),
    "a shift below zero": (
        EULER,
        {**DYNAMIC, "time_shift_type": "linear", "base_shift": -5.0},
        "the shift at",
    ),
}


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_followed_is_refused_by_every_reader(
    tmp_path: Path, bases: dict[str, Path], family: str, case: str
) -> None:
    kind, settings, words = REFUSED[case]
    folder = said(bases[family], tmp_path / "m", kind, **settings)
    for read in (load_family, fewstep.load):
        with pytest.raises(UserError, match=words) as caught:
            read(str(folder))
        assert "\n" not in str(caught.value)
    student = TorchOptions(student=str(folder), device="cpu", bits=32)
    with pytest.raises(UserError, match=words):
        load_staged(bases[family], built_in()[family], student)


def test_a_single_files_configuration_is_followed_or_refused_as_well(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({k: v.contiguous() for k, v in sd3_keys.checkpoint(tiny.original()).items()}, path)
    folder = said(bases["sd3"], tmp_path / "bad", use_karras_sigmas=True)
    with pytest.raises(UserError, match="use_karras_sigmas"):
        sd3.load(path, config=folder)
    assert sd3.load(path, config=said(bases["sd3"], tmp_path / "lcm", LCM)).sampler == "renoise"


def test_files_that_name_two_classes_are_refused(tmp_path: Path, bases: dict[str, Path]) -> None:
    for index, kind in ((EULER, LCM), (LCM, EULER)):
        folder = said(bases["sd3"], tmp_path / kind, kind, index, shift=3.0)
        with pytest.raises(UserError, match="make them the same"):
            fewstep.load(str(folder))


def test_parts_in_python_are_checked_too() -> None:
    for scheduler in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
    ):
        with pytest.raises(UserError, match="the scheduler"):
            sd3.assemble(tiny.parts(with_t5=False) | {"scheduler": scheduler}, name="x")


def drawn(folder: Path, family: str) -> torch.Tensor:
    """Latents by our grid and steps."""
    model = load_staged(folder, built_in()[family], TorchOptions(device="cpu", bits=32)).model
    plain = load_family(str(folder))
    assert (plain.shift, plain.sampler) == (model.shift, model.sampler)
    noise = model.from_numpy(sampling.batch_noise([1], model.latent))
    step = sampling.step_rule(model.sampler, [1], model.from_numpy)
    with torch.no_grad():
        grid, cond = schedule.grid(3, model.shift), model.text(["a cat"])
        return sampling.sample_flow(model.velocity, noise, grid, cond, step)


FOLLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults, written out": (EULER, {**schedulers.DEFAULTS, "shift": 3.0}),
    "a shift": (EULER, {"shift": 1.7}),
    "dynamic shifting": (EULER, DYNAMIC),
    "linear dynamic shifting": (EULER, {**DYNAMIC, "time_shift_type": "linear"}),
    "fresh noise": (EULER, {"shift": 3.0, "stochastic_sampling": True}),
    "consistency sampling": (LCM, {"shift": 3.0, "upscale_mode": "bicubic"}),
    "consistency sampling, dynamic shifting": (LCM, DYNAMIC),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_is_followed_is_stock_diffusers_image(
    tmp_path: Path, bases: dict[str, Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings = FOLLOWED[case]
    folder = said(bases["sd3"], tmp_path / "m", kind, **settings)
    fresh = iter(sampling.batch_noise([1], (4, 8, 8), stream=index) for index in range(1, 9))
    module = "scheduling_flow_match_lcm" if kind == LCM else "scheduling_flow_match_euler_discrete"
    noise = f"diffusers.schedulers.{module}.randn_tensor"
    monkeypatch.setattr(noise, lambda *args, **named: torch.from_numpy(next(fresh)))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        prompt="a cat",
        height=64,
        width=64,
        guidance_scale=1.0,
        num_inference_steps=3,
        sigmas=np.linspace(1, 1 / 3, 3).tolist(),
        latents=torch.from_numpy(sampling.batch_noise([1], (4, 8, 8))),
        max_sequence_length=tiny.LENGTH,
        output_type="latent",
    ).images
    assert (drawn(folder, "sd3") - stock).abs().max() < 1e-4


def test_a_students_own_schedule_is_followed(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = said(bases["sd3"], tmp_path / "base", shift=3.0)
    student = said(bases["sd3"], tmp_path / "student", LCM, **DYNAMIC)
    model = load_staged(
        base, sd3.ARCHITECTURE, TorchOptions(student=str(student), device="cpu", bits=32)
    ).model
    alone = load_family(str(student))
    assert (model.sampler, model.shift) == (alone.sampler, alone.shift) == ("renoise", alone.shift)
    assert model.shift != 3.0


# --- names ---


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("name", ["my-sd-3.5-medium", "v1.0", "a.b.safetensors", "plain"])
def test_a_folder_is_called_by_its_whole_name(
    tmp_path: Path, bases: dict[str, Path], family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bases[family], tmp_path / name)
    (tmp_path / name / "fewstep.json").unlink()
    for source in (str(tmp_path / name), f"{tmp_path / name}/"):
        assert (fewstep.load(source).model.name, load_family(source).name) == (name, name)
    monkeypatch.chdir(tmp_path / name)
    assert load_family(".").name == name


def test_a_file_is_called_without_its_suffix(tmp_path: Path) -> None:
    file = tmp_path / "my-sd-3.5-medium.safetensors"
    file.write_bytes(b"")
    assert name_of(file) == "my-sd-3.5-medium"
    hub = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium" / "snapshots" / "0123abc"
    assert (
        name_of(hub) == name_of(Path("stabilityai/stable-diffusion-3.5-medium")) == hub.parents[1].name[21:]
    )


def test_a_setting_that_is_listed_as_a_default_is_the_classes_default(tmp_path: Path) -> None:
    import diffusers

    from fewstep.families import schedulers

    told = {"_class_name": EULER, "shift": 3.0, "invert_sigmas": True, "base_shift": 0.25}
    for unset in ([], ["shift"], ["shift", "invert_sigmas"], ["invert_sigmas", "base_shift"]):
        config = {**told, "_use_default_values": unset}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        if "invert_sigmas" not in unset:
            with pytest.raises(UserError, match="invert_sigmas"):
                schedulers.read(tmp_path)
            continue
        stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config
        ours = schedulers.read(tmp_path)
        assert (ours.shift, ours.base_shift) == (stock.shift, stock.base_shift)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**told, "_use_default_values": "shift"}))
    with pytest.raises(UserError, match="_use_default_values"):
        schedulers.read(tmp_path)
