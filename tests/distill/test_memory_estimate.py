"""The plan of a step's memory: what it says is what the step holds."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import tiny_flux
from fewstep.cli import app as cli
from fewstep.distill import memory_estimate
from fewstep.distill.dry_run import FakeSetup, fake_net
from fewstep.families import sd3
from fewstep.families.presets import FLUX_DEV, PRESETS, SD35_MEDIUM, read_spec
from fewstep.families.spec import ModelSpec
from fewstep.modules.memory_tracker import KINDS, MemoryTracker
from fewstep.train import memory

pytestmark = pytest.mark.slow(35)


def narrow(spec: ModelSpec, net: dict[str, Any]) -> ModelSpec:
    """The same parts with another transformer, and 24 tokens of each text encoder."""
    tokens = dict.fromkeys(spec.max_tokens, tiny.LENGTH)
    return replace(spec, configs={**spec.configs, "transformer": net}, max_tokens=tokens)


SD3 = narrow(SD35_MEDIUM, tiny.SMALL | {"num_layers": 2})
FLUX = narrow(FLUX_DEV, tiny_flux.NET | {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True})
SETTINGS = [(2, True), (2, False), (0, True), (0, False)]


def setting(shape: ModelSpec, lora: int, recompute: bool) -> FakeSetup:
    dtype: Any = "bfloat16" if lora else "float32"
    return FakeSetup(
        shape=shape, side=64, batch_size=2, student_steps=2, lora=lora, activation_checkpointing=recompute,
        dtype=dtype, device="cpu", init="dry-run",
    )  # fmt: skip


@cache
def predicted(shape: str, lora: int, recompute: bool) -> memory_estimate.MemoryEstimate:
    shapes = {"sd3": SD3, "flux": FLUX}
    return memory_estimate.predict("flash", setting(shapes[shape], lora, recompute), gpu=False)


@pytest.mark.parametrize(("lora", "recompute"), SETTINGS)
def test_what_is_predicted_is_what_a_real_step_holds(lora: int, recompute: bool) -> None:
    assert_as_real(SD3, predicted("sd3", lora, recompute), lora, recompute)


def test_so_it_is_with_flux() -> None:
    assert_as_real(FLUX, predicted("flux", 2, True), 2, True)


def assert_as_real(
    shape: ModelSpec, told: memory_estimate.MemoryEstimate, lora: int, recompute: bool
) -> None:
    with warnings.catch_warnings(), MemoryTracker() as ledger:
        warnings.simplefilter("ignore")  # torch's, about mixed precision on a CPU
        peaks = memory.profile_steps(
            memory_estimate.fake_run("flash", setting(shape, lora, recompute), "fp32"), ledger, 2
        )
    turn, peak = max(peaks.items(), key=lambda pair: pair[1].total)
    assert told.update == turn
    assert told.peak == pytest.approx(peak.total, rel=1e-3)
    for kind in KINDS:
        assert told.held[kind] == pytest.approx(peak.held[kind], rel=2e-3)


def test_recomputing_lowers_the_peak_and_nothing_else() -> None:
    for lora in (2, 0):
        again, kept = (predicted("sd3", lora, recompute) for recompute in (True, False))
        assert again.held["activations"] < kept.held["activations"]
        assert {k: v for k, v in again.held.items() if k in ("frozen", "learning", "optimizer")} == {
            k: v for k, v in kept.held.items() if k in ("frozen", "learning", "optimizer")
        }


def test_roles_hold_the_base_once_and_whole_nets_hold_three() -> None:
    net = fake_net(SD3, "float32")
    weights, buffers = (sum(x.numel() for x in xs) for xs in (net.parameters(), net.buffers()))
    roles, whole = predicted("sd3", 2, True), predicted("sd3", 0, True)
    assert roles.held["frozen"] == 2 * (weights + buffers)  # bfloat16
    assert whole.held["frozen"] == 4 * (weights + 3 * buffers)
    heads = 2 * 4 * (2 * 16 + 16 * 64 + 64 + 64 + 1)
    assert whole.held["learning"] - heads == 2 * 4 * weights
    assert roles.held["learning"] - heads < weights


@pytest.mark.parametrize(("name", "many"), [("sd3.5-medium", 2_243_171_520), ("flux-dev", 11_901_408_320)])
def test_presets_are_the_models(name: str, many: int) -> None:
    assert sum(p.numel() for p in fake_net(PRESETS[name], "bfloat16", "meta").parameters()) == many


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan") / "model"
    sd3.save(sd3.assemble(tiny.parts(tiny.SMALL | {"num_layers": 2}), name="tiny"), made)
    return made


def test_a_folders_shape_is_its_models(folder: Path) -> None:
    shape, family = read_spec(str(folder)), sd3.load(folder)
    assert shape.architecture.latent_channels(shape.net) == family.latent[0]
    assert shape.side // shape.downscale == family.latent[1] and shape.downscale == family.downscale
    cond = family.text([""])
    assert cond.context.shape[1:] == shape.context_shape and cond.pooled.shape[1] == shape.pooled_dim
    assert sum(p.numel() for p in fake_net(shape, "float32").parameters()) == sum(
        p.numel() for p in family.net.parameters()
    )


def test_the_command_prints_a_table_and_says_what_fits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "estimate-memory",
        "--model",
        str(folder),
        "--method",
        "trajectory",
        "--lora",
        "2",
        "--activation-checkpointing",
    ]
    assert cli.run(asked) == 0
    assert "\nfits 24 GiB: LoRA 2, checkpointed" in capsys.readouterr().out
    assert cli.run([*asked, "--memory", "0.5GiB", "--batch-size", "2"]) == 0
    told = capsys.readouterr().out
    assert "does not fit 0.5 GiB" in told and "--batch-size 1 with --gradient-accumulation-steps 2" in told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--memory", "much"], "--memory must be a size such as 24GiB, not much"),
        (["--memory", "0"], "--memory must be a size"),
        (["--model", "nosuch"], "neither a folder nor one of sd3.5-medium, flux-dev"),
        (["--size", "1000"], "--size must be a multiple of 16 up to 6144, not 1000"),
        (["--size", "0"], "--size must be"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--student-steps", "0"], "--student-steps must be at least 1"),
        (["--lora", "-1"], "--lora must be at least 0, not -1"),
        (["--method", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_line(asked: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate-memory", *asked]) == 2
    said = capsys.readouterr()
    assert said.out == "" and told in said.err and said.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate-memory", "--measure"]) == 2
    assert "torch sees none here" in capsys.readouterr().err


def test_a_folder_without_its_configurations_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert cli.run(["estimate-memory", "--model", str(tmp_path)]) == 2
    assert "is incomplete: vae, " in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
def test_on_a_gpu_the_plan_is_within_a_tenth_of_the_measurement(recompute: bool) -> None:
    wide = {"num_attention_heads": 16, "attention_head_dim": 64, "caption_projection_dim": 1024}
    net = dict(SD3.net) | wide | {"num_layers": 6, "pos_embed_max_size": 64}
    shape = replace(SD3, configs={**SD3.configs, "transformer": net})
    line = memory_estimate.predict("flash", replace(setting(shape, 16, recompute), side=512), measure=True)
    assert line.measured == pytest.approx(line.peak, rel=0.1)
