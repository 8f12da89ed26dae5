"""What a LoRA file says of its layers, in every place where alpha, ranks and names can stand."""

from __future__ import annotations

import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_layouts as layouts
from fewstep.core.types import UserError
from fewstep.families.lora import adapters
from fewstep.families.lora.alpha import FILE, PEFT_CONFIG, PEFT_FILE
from fewstep.families.lora.file import read
from fewstep.families.lora.layers import resolve
from fewstep.families.registry import built_in

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj")
BLOCK = (*ATTENTION, "attn.add_v_proj", "attn.to_add_out", "ff.net.2", "norm1_context.linear")
SD3 = {f"transformer_blocks.{i}.{end}": (16, 16) for i in (0, 1) for end in BLOCK}
SD3 |= {f"transformer_blocks.{i}.ff.net.0.proj": (64, 16) for i in (0, 1)}
SD3 |= {"norm_out.linear": (32, 16), "proj_out": (16, 16), "pos_embed.proj": (16, 16)}
FLUX = {f"transformer_blocks.0.{end}": (16, 16) for end in BLOCK}
FLUX |= {f"single_transformer_blocks.0.attn.to_{x}": (16, 16) for x in "qkv"}
FLUX |= {"single_transformer_blocks.0.proj_mlp": (64, 16), "single_transformer_blocks.0.proj_out": (16, 80)}
FLUX |= {"norm_out.linear": (32, 16)}
CLIP = {f"text_model.encoder.layers.0.self_attn.{x}_proj": (8, 8) for x in ("q", "k", "v", "out")}
T5 = {f"encoder.block.0.layer.0.SelfAttention.{x}": (12, 12) for x in "qkvo"}
MODELS: dict[str, dict[str, Any]] = {
    "sd3": {"transformer": SD3, "text_encoder": CLIP, "text_encoder_2": CLIP, "text_encoder_3": T5},
    "flux": {"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5},
}
LAYER = "transformer_blocks.0.attn.to_q"


def deltas(path: Path, kind: str = "sd3", weight: float = 1.0) -> dict[str, torch.Tensor]:
    """What a file adds to a model's weights: ``part.layer`` -> ``[out, in]``."""
    parts = MODELS[kind]
    updates = adapters.updates_of([f"{path}:{weight}"], built_in()[kind], parts.get)
    return {
        f"{part}.{layer}": adapters.added(torch.zeros(parts[part][layer]), each, torch.float32)
        for part, layers in updates.items()
        for layer, each in layers.items()
    }


def one(scale: float = 1.0) -> tuple[layouts.Factors, torch.Tensor]:
    """The factors of one layer, and their product."""
    factors = layouts.draw({LAYER: (16, 16)})
    a, b = factors[LAYER]
    return factors, scale * b @ a


def assert_adds(
    path: Path, expected: torch.Tensor, where: str = f"transformer.{LAYER}", kind: str = "sd3"
) -> None:
    found = deltas(path, kind)
    assert found.keys() == {where}
    assert torch.allclose(found[where], expected, atol=1e-6)


# --- where alpha can stand ---


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 16}, 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8),
        ({"r": 8, "lora_alpha": 8, "rank_pattern": {"to_q": 4}}, 2),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{LAYER}": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"0.attn.to_q": 12, "to_q": 2}}, 3),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_(q|k)": 1}}, 0.25),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 1, "o_q": 1, "^attn.to_q": 1}}, 2),
        ({"r": 4}, 2),  # PEFT's default alpha is 8
        (
            {"r": 4, "lora_alpha": 2.5, "lora_dropout": 0.1, "init_lora_weights": "gaussian", "bias": "none"},
            0.625,
        ),
    ],
)
@pytest.mark.parametrize("place", ["header", "header of one part", "adapter_config.json"])
def test_a_configuration_scales(config: dict[str, Any], scale: float, place: str, tmp_path: Path) -> None:
    factors, expected = one(scale)
    if place == "adapter_config.json":
        path = layouts.peft_folder(tmp_path, factors, **config)
    elif place == "header":
        path = layouts.write(
            tmp_path / "a.safetensors", layouts.diffusers(factors), layouts.configured(**config)
        )
    else:
        tensors = {key.removeprefix("transformer."): t for key, t in layouts.diffusers(factors).items()}
        path = layouts.write(
            tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)}
        )
    assert_adds(path, expected)


def test_a_configuration_beside_diffusers_own_file(tmp_path: Path) -> None:
    factors, expected = one(3)
    path = layouts.write(tmp_path / FILE, layouts.diffusers(factors))
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    with pytest.warns(adapters.LoraWarning, match="alpha is taken from"):
        assert_adds(path, expected)


def test_each_part_has_its_own_configuration(tmp_path: Path) -> None:
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    clip = layouts.draw({layer: (8, 8)})
    said = {
        "text_encoder_2.r": 4,
        "text_encoder_2.lora_alpha": 2,
        "transformer.r": 4,
        "transformer.lora_alpha": 16,
    }
    tensors = layouts.diffusers(one()[0])
    for part in ("text_encoder", "text_encoder_2"):
        tensors |= layouts.diffusers(clip, part=part)
    path = layouts.write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    a, b = clip[layer]
    found = deltas(path)
    assert torch.allclose(found[f"transformer.{LAYER}"], one(4)[1], atol=1e-6)
    assert torch.allclose(found[f"text_encoder_2.{layer}"], 0.5 * b @ a, atol=1e-6)
    assert torch.allclose(found[f"text_encoder.{layer}"], b @ a, atol=1e-6)


@pytest.mark.parametrize(
    "alpha", [torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2), torch.tensor(2.0).half()]
)
def test_a_tensor_is_alpha(alpha: torch.Tensor, tmp_path: Path) -> None:
    factors, expected = one(0.5)
    named = {"kohya": layouts.kohya(factors), "ComfyUI": layouts.comfy(factors, prefix="transformer.")}
    for name, tensors in named.items():
        made = {key: alpha if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
        assert_adds(layouts.write(tmp_path / f"{name}.safetensors", made), expected)


@pytest.mark.filterwarnings("ignore::fewstep.families.lora.adapters.LoraWarning")
def test_kohyas_header_is_alpha_only_where_nothing_else_is(tmp_path: Path) -> None:
    factors, _ = one()
    said = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    assert_adds(layouts.write(tmp_path / "a.safetensors", layouts.kohya(factors, None), said), one(0.5)[1])
    assert_adds(layouts.write(tmp_path / "b.safetensors", layouts.kohya(factors, 6), said), one(1.5)[1])
    with pytest.raises(UserError, match="ss_network_alpha"):  # it may be in the factors, and may not
        deltas(layouts.write(tmp_path / "c.safetensors", layouts.diffusers(factors), said))
    assert_adds(layouts.write(tmp_path / "d.safetensors", layouts.kohya(factors, None)), one(1)[1])


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    factors, _ = one()
    said = {"ss_network_alpha": "2", "ss_network_dim": "4"}
    folder = layouts.peft_folder(tmp_path / "peft", factors, r=4)
    (folder / "adapter_config.json").unlink()
    stray = layouts.write(tmp_path / "stray" / "a.safetensors", layouts.diffusers(factors))
    (stray.parent / "adapter_config.json").write_text("{}")
    lone = {"lora_unet_final_layer_linear.alpha": torch.tensor(1.0)}
    files: dict[str, Any] = {
        "taken from its header": (layouts.kohya(factors, None), said),
        "there are no factors of it": (layouts.kohya(factors) | lone, {}),
        "no adapter_config.json": folder,
        "is not used, for a.safetensors may be": stray,
    }
    for words, file in files.items():
        path = file if isinstance(file, Path) else layouts.write(tmp_path / "a.safetensors", *file)
        with pytest.warns(adapters.LoraWarning, match=words):
            deltas(path)


# --- names ---


def test_layers_that_are_one_are_split(tmp_path: Path) -> None:
    for kind in MODELS:
        drawn, plain = layouts.original(kind, MODELS[kind]["transformer"])
        assert any("linear1" in name or "qkv" in name for name in drawn)
        expected = {f"transformer.{layer}": 1.5 * b @ a for layer, (a, b) in plain.items()}
        for tensors in (
            layouts.kohya(drawn),
            layouts.comfy(drawn),
            layouts.comfy(drawn, prefix="model.diffusion_model."),
            layouts.comfy(drawn, prefix="", ends=("lora_A", "lora_B")),
            layouts.comfy(drawn, prefix="base_model.model.", ends=("lora_A.default", "lora_B.default")),
            layouts.kohya({layer: pair for layer, pair in plain.items()}, prefix="lora_transformer_"),
        ):
            found = deltas(layouts.write(tmp_path / "a.safetensors", tensors), kind)
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_kohyas_split_projections(tmp_path: Path) -> None:
    ends = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    parts = layouts.draw(
        {f"single_transformer_blocks.0.{end}": FLUX[f"single_transformer_blocks.0.{end}"] for end in ends}
    )
    name = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.alpha": torch.tensor(8.0)}
    for i, (a, b) in enumerate(parts.values()):
        tensors |= {f"{name}.lora_down.{i}.weight": a, f"{name}.lora_up.{i}.weight": b}
    found = deltas(layouts.write(tmp_path / "a.safetensors", tensors), "flux")
    assert all(
        torch.allclose(found[f"transformer.{layer}"], 2 * b @ a, atol=1e-5) for layer, (a, b) in parts.items()
    )
    assert len(found) == 4


def test_xlabs_and_old_diffusers_names(tmp_path: Path) -> None:
    drawn, plain = layouts.original("flux", FLUX)
    (a, b), (c, d) = drawn["double_blocks.0.txt_attn.qkv"], drawn["single_blocks.0.linear2"]
    tensors = {
        "double_blocks.0.processor.qkv_lora2.down.weight": a,
        "double_blocks.0.processor.qkv_lora2.up.weight": b,
        "single_blocks.0.processor.proj_lora.down.weight": c,
        "single_blocks.0.processor.proj_lora.up.weight": d,
    }
    found = deltas(layouts.write(tmp_path / "a.safetensors", tensors), "flux")
    assert len(found) == 4
    for name, delta in found.items():
        x, y = plain[name.removeprefix("transformer.")]
        assert torch.allclose(delta, y @ x, atol=1e-5)
    factors, expected = one()
    x, y = factors[LAYER]
    old = LAYER.replace("attn.", "attn.processor.")
    for at, ends in ((LAYER, "lora."), (old, "_lora."), (LAYER, "lora_linear_layer.")):
        name = f"transformer.{at}{'' if ends.startswith('_') else '.'}{ends}"
        tensors = {f"{name}down.weight": x.clone(), f"{name}up.weight": y.clone()}
        assert_adds(layouts.write(tmp_path / "b.safetensors", tensors), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_text_encoders_by_every_name(kind: str, tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    drawn, t5 = (
        layouts.draw({clip: (8, 8)}),
        layouts.draw({"encoder.block.0.layer.0.SelfAttention.o": (12, 12)}),
    )
    last = "text_encoder_3" if kind == "sd3" else "text_encoder_2"
    short = {clip.removeprefix("text_model."): drawn[clip]}
    old = {clip.replace("q_proj", "to_q"): drawn[clip]}
    cases: list[tuple[str, Any]] = [
        *(("text_encoder", layouts.kohya(each, 4, "lora_te1_")) for each in (drawn, short)),
        ("text_encoder", layouts.kohya(drawn, 4, "lora_te_")),
        ("text_encoder", layouts.comfy(drawn, 4, "text_encoders.clip_l.transformer.")),
        *(("text_encoder", layouts.diffusers(each)) for each in ()),
        *(("text_encoder", layouts.diffusers(each, part="text_encoder")) for each in (drawn, short, old)),
        (last, layouts.kohya(t5, 4, "lora_te3_")),
        (last, layouts.comfy(t5, 4, "text_encoders.t5xxl.transformer.")),
        (last, layouts.diffusers(t5, part=last)),
    ]
    if kind == "sd3":
        cases += [("text_encoder_2", layouts.kohya(drawn, 4, "lora_te2_"))]
        cases += [("text_encoder_2", layouts.comfy(drawn, 4, "text_encoders.clip_g.transformer."))]
    else:
        cases += [(last, layouts.kohya(t5, 4, "lora_te2_"))]
    for part, tensors in cases:
        (layer, (a, b)) = next(iter((drawn if part == "text_encoder" or part != last else t5).items()))
        assert_adds(layouts.write(tmp_path / "a.safetensors", tensors), b @ a, f"{part}.{layer}", kind)


# --- numbers ---


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_every_precision_is_added_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    factors, _ = one()
    tensors = {key: tensor.to(dtype) for key, tensor in layouts.diffusers(factors).items()}
    a, b = (tensor.float() for tensor in tensors.values())
    assert_adds(layouts.write(tmp_path / "a.safetensors", tensors), b @ a)


def test_ranks_may_differ_and_alpha_follows_each(tmp_path: Path) -> None:
    shapes = {f"transformer_blocks.{i}.attn.to_q": (16, 16) for i in (0, 1)}
    drawn = layouts.draw(shapes)
    wide = {
        layer: (a.repeat(i + 1, 1), b.repeat(1, i + 1)) for i, (layer, (a, b)) in enumerate(drawn.items())
    }
    found = deltas(layouts.write(tmp_path / "a.safetensors", layouts.kohya(wide, 8)))
    for i, (layer, (a, b)) in enumerate(wide.items()):
        assert torch.allclose(found[f"transformer.{layer}"], 8 / (4 * (i + 1)) * b @ a, atol=1e-5)


def test_a_convolution(tmp_path: Path) -> None:
    a, b = torch.randn(4, 4, 2, 2), torch.randn(16, 4, 1, 1)
    weight = torch.randn(16, 4, 2, 2)
    expected = weight + torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    tensors = {"lora_unet_x_embedder_proj.lora_down.weight": a, "lora_unet_x_embedder_proj.lora_up.weight": b}
    path = layouts.write(tmp_path / "a.safetensors", tensors)
    update = adapters.updates_of([f"{path}:1"], built_in()["sd3"], MODELS["sd3"].get)["transformer"][
        "pos_embed.proj"
    ]
    assert torch.allclose(adapters.added(weight, update, torch.float32), expected, atol=1e-5)


def test_rows_are_added_piece_by_piece_to_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "a.safetensors", layouts.diffusers(one()[0]))
    update = adapters.updates_of([f"{path}:1"], built_in()["sd3"], MODELS["sd3"].get)["transformer"][LAYER]
    weight = torch.randn(16, 16).bfloat16()
    whole = {kind: adapters.added(weight.clone(), update, kind) for kind in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(adapters, "CHUNK", 40)
    for kind, expected in whole.items():
        found = adapters.added(weight.clone(), update, kind)
        assert found.dtype == kind and torch.allclose(found.float(), expected.float(), atol=1e-2)
    assert (whole[torch.float32] - weight.float() - one()[1]).abs().max() < 1e-5


# --- refused ---

A, B = torch.ones(4, 16), torch.ones(16, 4)
PLAIN = {f"transformer.{LAYER}.lora_A.weight": A, f"transformer.{LAYER}.lora_B.weight": B}
K = "lora_unet_joint_blocks_0_x_block_attn_proj"
PAIR = {f"{K}.lora_down.weight": A, f"{K}.lora_up.weight": B}


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): tensor for key, tensor in PLAIN.items()}


def pair(layer: str, down: str = "lora_down", up: str = "lora_up") -> dict[str, torch.Tensor]:
    return {f"{layer}.{down}.weight": A, f"{layer}.{up}.weight": B}


OTHERS: dict[str, dict[str, torch.Tensor]] = {
    "LoHa": {f"{K}.hada_w1_a": A, f"{K}.hada_w1_b": B, f"{K}.alpha": torch.tensor(1.0)},
    "LoKr": {f"{K}.lokr_w1": A, f"{K}.lokr_w2": B},
    "OFT": {f"{K}.oft_blocks": A},
    "IA3": {f"{K}.ia3_l": A},
    "DoRA": PLAIN | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(16)},
    "DoRA (lora_unet": PAIR | {f"{K}.dora_scale": torch.ones(16)},
    "Tucker": PAIR | {f"{K}.lora_mid.weight": torch.ones(4, 4)},
    "biases": PLAIN | {f"transformer.{LAYER}.lora_B.bias": torch.ones(16)},
    "whole differences": PLAIN | {f"{K}.diff_b": torch.ones(16)},
    "whole weights": PLAIN | {f"{K}.set_weight": torch.ones(16)},
    "norms": PLAIN | {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(8)},
    "embeddings": PLAIN | {"emb_params": torch.ones(8)},
    "an embedding's": PLAIN | {"text_encoder.text_model.lora_embedding_A": torch.ones(8)},
    f"{LAYER}.scale": PLAIN | {f"transformer.{LAYER}.scale": torch.tensor(2.0)},
    "no lora_A": {},
    "no counterpart": {f"transformer.{LAYER}.lora_A.weight": A},
    "twice": PLAIN | pair(f"transformer.{LAYER}"),
    "adds to": PLAIN | pair(f"lora_unet_{LAYER.replace('.', '_')}"),
    "several adapters": PLAIN | pair(f"transformer.{LAYER[:-1]}k", "lora_A.style", "lora_B.style"),
    "another shape": {name: A[:, :8] if "lora_A" in name else B for name in PLAIN},
    "another shape than a product": {name: A[:2] if "lora_A" in name else B for name in PLAIN},
    "as I8": {key: tensor.to(torch.int8) for key, tensor in PLAIN.items()},
    "no finite number": PAIR | {f"{K}.alpha": torch.tensor(math.nan)},
    "looks like one for flux": renamed("transformer_blocks", "single_transformer_blocks"),
    "looks like one for a U-Net": pair("lora_unet_down_blocks_1_attn1_to_q"),
    "looks like one for Wan": pair("diffusion_model.blocks.0.self_attn.q", "lora_A", "lora_B"),
    "no layer of it": renamed("blocks.0", "blocks.7"),
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_is_not_followed_is_refused_by_name(words: str, tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "a.safetensors", OTHERS[words])
    with pytest.raises(UserError) as caught:
        deltas(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_of_nought_beside_change_nothing(tmp_path: Path) -> None:
    more = {f"{K}.diff_b": torch.zeros(16), f"transformer.{LAYER}.lora_B.bias": torch.zeros(16)}
    path = layouts.write(tmp_path / "a.safetensors", PLAIN | more)
    with pytest.warns(adapters.LoraWarning, match="is not used: it holds nought alone"):
        assert_adds(path, B @ A)


def test_a_flux_lora_is_not_half_added_to_sd3(tmp_path: Path) -> None:
    """Both families have ``transformer_blocks``; of these two the model here even has one."""
    more = {k.replace("transformer_blocks", "single_transformer_blocks"): t.clone() for k, t in PLAIN.items()}
    with pytest.raises(UserError, match="looks like one for flux"):
        deltas(layouts.write(tmp_path / "a.safetensors", PLAIN | more))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_that_are_none_are_one_line(bad: float, side: str, tmp_path: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in PLAIN.items()}
    tensors[f"transformer.{LAYER}.lora_{side}.weight"][1, 1] = bad
    with pytest.raises(UserError, match="holds NaN or infinity in"):
        deltas(layouts.write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (layouts.configured(r=4, use_dora=True), "sets use_dora"),
        (layouts.configured(r=4, init_lora_weights="pissa"), "sets init_lora_weights"),
        (layouts.configured(r=4, lora_bias=True), "sets lora_bias"),
        (layouts.configured(r=4, layer_replication=[[0, 1]]), "sets layer_replication"),
        (layouts.configured(r=4, peft_type="LOHA"), "sets peft_type"),
        (layouts.configured(r=8), "and the header of"),
        (layouts.configured(r=4, rank_pattern={"to_q": 2}), "rank 4"),
        (layouts.configured(r=0), "ranks must be positive"),
        (layouts.configured(r="4"), "expected int"),
        (layouts.configured(alpha_pattern=[1]), "alpha_pattern"),
        (layouts.configured(r=4, alpha_pattern={"(a+)+$": 1}), "pattern"),
        (layouts.configured(r=4, alpha_pattern={".*.*.*.*x": 1}), "pattern"),
        (layouts.configured(r=4, alpha_pattern={"(": 1}), "pattern"),
        ({"lora_adapter_metadata": "{"}, "not JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "damaged"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"network_scale": "0.5"}, "network_scale"),
    ],
)
def test_a_header_that_cannot_be_followed(header: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        deltas(layouts.write(tmp_path / "a.safetensors", PLAIN, header))
    assert "\n" not in str(caught.value)


def test_a_strangers_names_stay_in_their_line(tmp_path: Path) -> None:
    path = layouts.write(tmp_path / "a.safetensors", PLAIN | {"x\n\x1b[31m" + "y" * 999: torch.ones(2)})
    with pytest.raises(UserError) as caught:
        deltas(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_two_alphas_must_agree(tmp_path: Path) -> None:
    alpha = {f"transformer.{LAYER}.alpha": torch.tensor(8.0)}
    path = layouts.write(tmp_path / "a.safetensors", PLAIN | alpha, layouts.configured(r=4, lora_alpha=8))
    assert_adds(path, 2 * B @ A)
    layouts.write(path, PLAIN | alpha, layouts.configured(r=4, lora_alpha=16))
    with pytest.raises(UserError, match="two alphas"):
        deltas(path)


# --- what else may be a scale ---

SPELLINGS = ("alpha", "lora.alpha", "lora_A.alpha", "lora_B.alpha", "lora_alpha", "lora_A.default.alpha")


@pytest.mark.parametrize("end", SPELLINGS[:-1])
def test_an_alpha_of_a_layer_is_followed_however_it_is_spelt(end: str, tmp_path: Path) -> None:
    alpha = {f"transformer.{LAYER}.{end}": torch.tensor(16.0)}
    assert_adds(layouts.write(tmp_path / "a.safetensors", PLAIN | alpha), 4 * B @ A)


@pytest.mark.parametrize(
    "name",
    [f"transformer.{LAYER}.{SPELLINGS[-1]}", "transformer.alpha", "alpha", "lora_alpha", f"{LAYER}.alpha"],
)
def test_an_alpha_that_may_be_of_a_layer_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="may be a scale and is not followed"):
        deltas(layouts.write(path, PLAIN | {name: torch.tensor(16.0)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adapters.LoraWarning)
        assert_adds(layouts.write(path, PLAIN | {name: torch.tensor(4.0)}), B @ A)


def test_two_alphas_of_a_layer_must_agree_however_they_are_spelt(tmp_path: Path) -> None:
    alpha = {
        f"transformer.{LAYER}.{end}": torch.tensor(x) for end, x in (("alpha", 8.0), ("lora.alpha", 4.0))
    }
    with pytest.raises(UserError, match="two alphas of one layer"):
        deltas(layouts.write(tmp_path / "a.safetensors", PLAIN | alpha))


@pytest.mark.parametrize(("value", "fits"), [(1.0, True), (0.0, False), (4.0, False)])
def test_a_tensor_that_scales_is_refused_unless_it_is_one(value: float, fits: bool, tmp_path: Path) -> None:
    scale = {f"transformer.{LAYER}.scale": torch.tensor(value)}
    path = layouts.write(tmp_path / "a.safetensors", PLAIN | scale)
    if fits:
        assert_adds(path, B @ A)
    else:
        with pytest.raises(UserError, match="is not followed"):
            deltas(path)


@pytest.mark.parametrize("key", ["config", "adapter_config", "peft_config"])
def test_a_configuration_under_another_key_is_followed(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    said = {"r": 4, "lora_alpha": 16}
    assert_adds(layouts.write(path, PLAIN, {key: json.dumps(said)}), 4 * B @ A)
    assert_adds(layouts.write(path, PLAIN, {key: json.dumps(said | {"use_rslora": True})}), 8 * B @ A)
    for wrong in ({"r": 8}, {"use_dora": True}):
        with pytest.raises(UserError):
            deltas(layouts.write(path, PLAIN, {key: json.dumps(said | wrong)}))
    two = {"config": json.dumps(said), "peft_config": json.dumps(said | {"lora_alpha": 4})}
    with pytest.raises(UserError, match="contradict"):
        deltas(layouts.write(path, PLAIN, two))


OTHER_SCALES: tuple[dict[str, Any], ...] = (
    {"config": {"r": 4, "alpha": 16}},
    {"config": {"lora": {"lora_alpha": 16, "r": 4}}},
    {"training_config": {"network": {"linear": 4, "linear_alpha": 16}}},
    {"training_config": [{"deep": '{"lora_alpha": "16"}'}]},
    {"training_config": "network:\n  linear: 4\n  linear_alpha: 16\n"},
    {"training_config": "{'r': 4, 'lora_alpha': 16}"},
    {"ss_network_alpha": "16", "ss_network_dim": "4"},
    {"ss_network_args": {"alpha": 16}},
    {"ss_network_args": {"rs_lora": "True"}},
    {"ss_scale": "4"},
    {"modelspec.scale": "4"},
    {"multiplier": "4"},
    {"lora_strength": "4"},
    {"lora_scaling": "a lot"},
    {"rank": "4", "rslora": "true"},
    {"x": {"alpha_pattern": {"attn.to_q": 16}}},
    {"alpha": "16"},
)


@pytest.mark.parametrize("header", OTHER_SCALES, ids=str)
def test_a_header_with_another_scale_is_refused(header: dict[str, Any], tmp_path: Path) -> None:
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    with pytest.raises(UserError, match="which may be a scale and is not followed") as caught:
        deltas(layouts.write(tmp_path / "a.safetensors", PLAIN, said))
    assert "\n" not in str(caught.value)


HARMLESS: tuple[dict[str, Any], ...] = (
    {"config": {"r": 4, "alpha": 4}},
    {"config": {"r": 8, "alpha": 8}},  # the rank was cut since
    {"training_config": {"network": {"linear": 4, "linear_alpha": 4, "conv": 2, "conv_alpha": 2}}},
    {"ss_network_alpha": "4.0", "ss_network_dim": "4"},
    {"ss_network_args": {"rs_lora": "False"}, "ss_scale_weight_norms": "1.5", "ss_lr_multiplier": "2"},
    {"ss_tag_frequency": {"1_cat": {"scales": 3, "grayscale": 5, "alpha": 2}}},
    {
        "ss_datasets": [{"alpha_mask": True, "tag_frequency": {"a": {"strength": 4}}}],
        "ss_guidance_scale": "3.5",
    },
    {"ss_optimizer": "Adafactor(scale_parameter=False)", "ss_bucket_no_upscale": "True"},
    {"scale": "1", "multiplier": "1.0", "use_rslora": "false", "lora_alpha": "None"},
    {"modelspec.description": "[v2] sharp scales of fish", "x": "[" * 10**5},
    {"x": {"alpha_pattern": {}, "rank_pattern": {}}},
)


@pytest.mark.parametrize("header", HARMLESS, ids=lambda header: str(header)[:60])
def test_a_header_that_says_no_other_scale_is_taken_silently(header: dict[str, Any], tmp_path: Path) -> None:
    said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapters.LoraWarning)
        assert_adds(layouts.write(tmp_path / "a.safetensors", PLAIN, said), B @ A)


def test_a_header_beside_tensors_of_alpha_informs_in_kohyas_layout_alone(tmp_path: Path) -> None:
    factors, expected = one(1.5)
    said = {"ss_network_alpha": "16", "ss_network_args": json.dumps({"rs_lora": "True", "conv_alpha": "1"})}
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapters.LoraWarning)
        assert_adds(layouts.write(tmp_path / "a.safetensors", layouts.kohya(factors, 6), said), expected)
    alpha = {f"transformer.{LAYER}.alpha": torch.tensor(6.0)}
    for tensors, header in ((PLAIN | alpha, said), (layouts.kohya(factors, 6), {"lora_alpha": "16"})):
        with pytest.raises(UserError, match="may be a scale"):
            deltas(layouts.write(tmp_path / "b.safetensors", tensors, header))


@pytest.mark.parametrize("more", [{"rs_lora": "True"}, {"alpha": 3}, {"conv_dim": 4, "conv_alpha": 9}])
def test_kohyas_header_that_says_more_than_alpha_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    said = {"ss_network_alpha": "16", "ss_network_args": json.dumps(more)}
    with pytest.raises(UserError, match="may be a scale"):
        deltas(layouts.write(tmp_path / "a.safetensors", layouts.kohya(one()[0], None), said))


# --- files, weights ---


def test_a_folder_is_searched(tmp_path: Path) -> None:
    for name in (FILE, PEFT_FILE, f"lora/{FILE}", "anything.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        path = layouts.write(folder / name, PLAIN)
        assert adapters.find(folder) == path == adapters.find(path)
    layouts.write(folder / "second.safetensors", PLAIN)
    with pytest.raises(UserError, match="several"):
        adapters.find(folder)
    with pytest.raises(UserError, match=r"cannot be read|there is no LoRA"):
        adapters.find(Path("a" * 5000))
    with pytest.raises(UserError, match=r"cannot be read|there is no LoRA"):
        adapters.find(Path("a\0b"))


def test_file_and_weight_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:2", "c", "c:3"):
        Path(name).touch()
    cases = {
        "a.safetensors": ("a.safetensors", 1),
        "a.safetensors:0.5": ("a.safetensors", 0.5),
        "a.safetensors:-1": ("a.safetensors", -1),
        "a.safetensors:0": ("a.safetensors", 0),
        "a.safetensors:1e-1": ("a.safetensors", 0.1),
        "b:2": ("b:2", 1),
        "b:2:0.5": ("b:2", 0.5),
        "c:3": ("c", 3),
        "c:3:1": ("c:3", 1),
        "nowhere:0.5": ("nowhere", 0.5),
        r"C:\loras\x.safetensors": (r"C:\loras\x.safetensors", 1),
        r"C:\x.safetensors:0.7": (r"C:\x.safetensors", 0.7),
    }
    for text, (name, weight) in cases.items():
        assert adapters.parsed(text) == (name, weight)
        assert adapters.parsed(adapters.specs(text)[0]) == (name, weight)
    for text in (
        "a.safetensors:nan",
        "a.safetensors:inf",
        "a.safetensors:",
        "a.safetensors:much",
        "",
        ":0.5",
    ):
        with pytest.raises(UserError, match="--lora"):
            adapters.parsed(text)


def test_python_gives_text_paths_and_pairs() -> None:
    assert adapters.specs(None) == () == adapters.specs([])
    assert adapters.specs(["a:0.5", Path("b"), ("c", 2)]) == ("a:0.5", "b:1.0", "c:2.0")
    assert adapters.specs(("a", 0.5)) == ("a:0.5",)
    assert adapters.specs(("a", "b")) == ("a:1.0", "b:1.0")
    for bad in (3, [3], [("a", "x")], [("a", math.nan)], [(1, 2)], [("a", 1, 2)]):
        with pytest.raises(UserError):
            adapters.specs(bad)


# --- any file ---


def raw(path: Path, header: Any, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


NAMES = st.sampled_from(
    [*PLAIN, f"{K}.lora_down.weight", f"{K}.lora_up.weight", f"{K}.alpha", f"{K}.lora_mid.weight", "x", ""]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.dictionaries(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "transformer.r",
            "transformer.x",
            "bias",
        ]
    ),
    VALUES,
)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tensors=st.dictionaries(
        NAMES,
        st.tuples(
            st.sampled_from(["F32", "F16", "F8_E4M3", "I64", "BOOL", "Q9"]),
            st.lists(st.integers(-1, 17) | st.just(2**40), max_size=3),
            st.integers(0, 64),
        ),
        max_size=5,
    ),
    header=st.dictionaries(
        st.sampled_from(["lora_adapter_metadata", "ss_network_alpha", "alpha"]),
        VALUES | CONFIGS.map(json.dumps),
        max_size=2,
    ),
    config=CONFIGS | VALUES,
)
def test_any_file_is_read_or_refused(tensors: Any, header: Any, config: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    entries, end = {}, 0
    for name, (kind, shape, size) in tensors.items():
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    path = raw(folder / PEFT_FILE, {"__metadata__": header, **entries}, bytes(end))
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    try:
        resolve(read(path), built_in()["sd3"], MODELS["sd3"].get)
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS)
def test_any_configuration_is_followed_or_refused(config: Any, tmp_path_factory: Any) -> None:
    path = layouts.write(
        tmp_path_factory.mktemp("any") / "a.safetensors", PLAIN, layouts.configured(**config)
    )
    try:
        scale = read(path).factors[0].scale
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert math.isfinite(scale)
