"""One reader of weights: what a file holds is used, named as without effect, or a reason to refuse it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from fewstep.core import sampling, schedule
from fewstep.core.types import Model, UserError
from fewstep.export.common import sd3_keys
from fewstep.families import sd3
from fewstep.families.safetensors_match import LoadWarning
from fewstep.families.safetensors_tensors import header
from fewstep.inference.load import load as load_staged
from fewstep.inference.options import TorchOptions

pytestmark = pytest.mark.slow(5)

PROMPT = ["a red apple"]
Tensors = dict[str, torch.Tensor]
NET = "transformer/diffusion_pytorch_model.safetensors"
CODEC = "vae/diffusion_pytorch_model.safetensors"
CLIP, T5 = "text_encoder/model.safetensors", "text_encoder_3/model.safetensors"
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "base"
    sd3.save(sd3.assemble(tiny.original(), name="base", steps=2, guidance=None), folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    shutil.copytree(base, tmp_path / "m")
    return tmp_path / "m"


def plain(folder: Path) -> Model:
    return sd3.load(folder)


def staged(folder: Path) -> Model:
    return load_staged(folder, sd3.ARCHITECTURE, TorchOptions(device="cpu", bits=32)).model


readers = pytest.mark.parametrize("reader", [plain, staged])
Reader = Callable[[Path], Model]


def latents(model: Model) -> torch.Tensor:
    noise = model.from_numpy(sampling.batch_noise([3], model.latent))
    with torch.no_grad():
        drawn = sampling.sample_flow(model.velocity, noise, schedule.grid(2, model.shift), model.text(PROMPT))
        return model.codec.decode(drawn)


def changed(path: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


# --- 8-bit floats ---


def narrowed(tensors: Tensors, layout: str) -> Tensors:
    """Matrices of the blocks as 8-bit floats, scales beside them; and what they stand for, as float32."""
    few, back = dict(tensors), dict(tensors)
    dtype = torch.float8_e5m2 if "e5m2" in layout else torch.float8_e4m3fn
    for name, weight in tensors.items():
        if "blocks." not in name or weight.ndim != 2:
            continue
        rows = weight.abs().amax(1) if "rows" in layout else weight.abs().max()
        scale = torch.ones(()) if "bare" in layout else (rows / 400).float()
        wide = scale[:, None] if scale.ndim else scale
        few[name] = (weight / wide).to(dtype)
        back[name] = few[name].float() * wide
        layer = name.removesuffix("weight")
        if "comfy" in layout:
            few[f"{layer}scale_weight"] = scale.reshape(-1) if "rows" in layout else scale
        elif "bare" not in layout:
            few[f"{layer}weight_scale"] = wide
            few[f"{layer}input_scale"] = torch.tensor(0.5)
    if "comfy" in layout:
        few["scaled_fp8"] = torch.empty(2, dtype=dtype)
    return few if "back" not in layout else back


LAYOUTS = ("comfy", "comfy e5m2", "comfy rows", "scalar", "rows", "rows e5m2", "bare")


@pytest.mark.filterwarnings("ignore::fewstep.families.safetensors_match.LoadWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_8_bit_floats_are_their_values_times_their_scales(folder: Path, tmp_path: Path, layout: str) -> None:
    shutil.copytree(folder, tmp_path / "back")
    before = load_file(folder / NET)
    few = narrowed(before, layout) | {"context_embedder.bias": before["context_embedder.bias"].double()}
    save_file(few, folder / NET, {"format": "pt"})
    save_file(narrowed(before, f"{layout} back"), tmp_path / "back" / NET, {"format": "pt"})
    want = latents(plain(tmp_path / "back"))
    assert (want - latents(plain(folder))).abs().max() < 1e-5
    assert (want - latents(staged(folder))).abs().max() < 1e-5


def test_scales_in_a_single_file_reach_all_three_projections(tmp_path: Path, base: Path) -> None:
    tensors = sd3_keys.checkpoint(tiny.original())
    for layout, name in (("comfy rows", "few"), ("comfy rows back", "wide")):
        made = {key: tensor.contiguous() for key, tensor in narrowed(tensors, layout).items()}
        assert len(made) > len(tensors) or name == "wide"
        save_file(made, tmp_path / f"{name}.safetensors")
    few, wide = (sd3.load(tmp_path / f"{name}.safetensors", config=base) for name in ("few", "wide"))
    assert (latents(few) - latents(wide)).abs().max() < 1e-5


# --- what is refused ---


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def _whole_numbers(tensors: Tensors) -> None:
    tensors[f"{QUERY}.weight"] = torch.ones(16, 16, dtype=torch.int8)


def _blocks(tensors: Tensors) -> None:
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{QUERY}.weight_scale"] = torch.ones(4, 4)


def _columns(tensors: Tensors) -> None:
    _blocks(tensors)
    tensors[f"{QUERY}.weight_scale"] = torch.ones(1, 16)


def _inverse(tensors: Tensors) -> None:
    _blocks(tensors)
    tensors[f"{QUERY}.weight_scale_inv"] = tensors.pop(f"{QUERY}.weight_scale")


def _quanto(tensors: Tensors) -> None:
    tensors[f"{QUERY}.weight._data"] = tensors.pop(f"{QUERY}.weight").to(torch.int8)
    tensors[f"{QUERY}.weight._scale"] = torch.ones(16, 1)


def _described(**fields: Any) -> Callable[[Tensors], None]:
    text = json.dumps({"format": "float8_e4m3fn", **fields}).encode()
    return put(f"{QUERY}.comfy_quant", torch.tensor(list(text), dtype=torch.uint8))


REFUSED: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "whole numbers": (NET, _whole_numbers, "I8"),
    "a scale a block": (NET, _blocks, "layout"),
    "a scale a column": (NET, _columns, "layout"),
    "an inverse scale": (NET, _inverse, "weight_scale_inv"),
    "a scale of floats": (NET, put(f"{QUERY}.weight_scale", torch.tensor(2.0)), "F32"),
    "zero points": (NET, put(f"{QUERY}.weight_zero_point", torch.zeros(16)), "zero_point"),
    "a mark of scales that are not there": (NET, put("scaled_fp8", torch.empty(2)), "no scale"),
    "a field that is not known": (NET, _described(group_size=32), "group_size"),
    "a rotation": (NET, _described(convrot=True), "convrot"),
    "quanto": (NET, _quanto, r"weight\._data"),
    "a LoRA": (NET, put(f"{QUERY}.lora_A.weight", torch.ones(2, 16)), "LoRA in a file"),
    "a block more": (NET, put("transformer_blocks.7.attn.to_q.weight", torch.ones(16, 16)), "blocks.7"),
    "a bias more": (NET, put("transformer_blocks.0.attn.norm_q.bias", torch.ones(8)), "norm_q.bias"),
    "a convolution that is off": (CODEC, put("quant_conv.weight", torch.ones(8, 8, 1, 1)), "quant_conv"),
    "positions in another order": (
        CLIP,
        put("text_model.embeddings.position_ids", torch.arange(24).flip(0)[None]),
        "position_ids",
    ),
    "another table of T5": (T5, lambda tensors: _second_table(tensors, 1.0), "embed_tokens|shared"),
    "a lack": (NET, lambda tensors: tensors.pop("proj_out.bias"), "lacks weights, among them proj_out.bias"),
    "another shape": (NET, put("proj_out.bias", torch.zeros(3)), "another net than its configuration"),
}


def _second_table(tensors: Tensors, more: float) -> None:
    (name,) = tensors.keys() & {"shared.weight", "encoder.embed_tokens.weight"}
    (other,) = {"shared.weight", "encoder.embed_tokens.weight"} - {name}
    tensors[other] = tensors[name] + more


@readers
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_image_is_refused_in_one_line(folder: Path, case: str, reader: Reader) -> None:
    file, change, words = REFUSED[case]
    changed(folder / file, change)
    with pytest.raises(UserError, match=words) as caught:
        reader(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@readers
def test_a_configuration_of_quantized_weights_is_refused(folder: Path, reader: Reader) -> None:
    for part in ("transformer", "text_encoder_3", "vae"):
        path = folder / part / "config.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), "quantization_config": {"quant_method": "fp8"}}))
        with pytest.raises(UserError, match="quantized already"):
            reader(folder)
        path.write_text(before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conditioner.embedders.0.weight", "conditioner"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down", "LoRA in a file"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.zero_point", "quantized"),
        ("first_stage_model.quant_conv.weight", "quant_conv"),
        ("first_stage_model.decoder.extra.weight", r"decoder\.extra"),
        ("text_encoders.clip_g.transformer.text_model.more.weight", r"text_model\.more"),
    ],
)
def test_what_no_part_of_a_single_file_uses_is_refused(
    tmp_path: Path, base: Path, name: str, words: str
) -> None:
    tensors = sd3_keys.checkpoint(tiny.original()) | {name: torch.ones(8, 8, 1, 1)}
    path = tmp_path / "m.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=words) as caught:
        sd3.load(path, config=base)
    assert "m.safetensors" in str(caught.value)


# --- what is passed over ---

PASSED: dict[str, tuple[str, str]] = {
    "an averaged copy": (NET, "model_ema.decay"),
    "a counter": (CODEC, "encoder.norm.num_batches_tracked"),
    "the other tower of a CLIP": (CLIP, "vision_model.pre_layrnorm.weight"),
    "the other half of a T5": (T5, "decoder.block.0.layer.0.SelfAttention.q.weight"),
}


@readers
@pytest.mark.parametrize("case", PASSED)
def test_what_changes_nothing_is_named(folder: Path, base: Path, case: str, reader: Reader) -> None:
    file, name = PASSED[case]
    changed(folder / file, put(name, torch.ones(2)))
    with pytest.warns(LoadWarning, match=name):
        model = reader(folder)
    assert torch.equal(latents(model), latents(reader(base)))


# --- names ---


def _embedded(tensors: Tensors) -> None:
    _second_table(tensors, 0.0)
    del tensors["shared.weight"]


def _shared(tensors: Tensors) -> None:
    _second_table(tensors, 0.0)
    del tensors["encoder.embed_tokens.weight"]


def _short(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("text_model.")]:
        tensors[name.removeprefix("text_model.")] = tensors.pop(name)


NAMES: dict[str, tuple[str, Callable[[Tensors], Any]]] = {
    "positions": (CLIP, put("text_model.embeddings.position_ids", torch.arange(24)[None])),
    "positions of another length": (CLIP, put("embeddings.position_ids", torch.arange(77.0))),
    "T5 embedded": (T5, _embedded),
    "T5 shared": (T5, _shared),
    "T5 both": (T5, lambda tensors: _second_table(tensors, 0.0)),
    "CLIP without a prefix": (CLIP, _short),
}


@readers
@pytest.mark.parametrize("case", NAMES)
def test_other_names_of_the_same_weights_draw_the_same_image(
    folder: Path, base: Path, case: str, reader: Reader
) -> None:
    file, change = NAMES[case]
    changed(folder / file, change)
    assert torch.equal(latents(reader(folder)), latents(reader(base)))


@readers
def test_weights_in_several_files_or_in_files_of_one_precision(
    folder: Path, base: Path, reader: Reader
) -> None:
    tensors = load_file(folder / NET)
    names = sorted(tensors)
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / "transformer" / file)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    (folder / NET).unlink()
    (folder / CLIP).rename(folder / CLIP.replace("model.", "model.fp32."))
    assert torch.equal(latents(reader(folder)), latents(reader(base)))
    index.write_text(json.dumps({"weight_map": {**files, names[0]: "../../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="elsewhere"):
        reader(folder)


def test_half_precision_keeps_the_layers_of_t5_that_overflow_in_it(base: Path) -> None:
    t5 = sd3.load(base, dtype="float16").parts["text_encoder_3"]
    kinds = {name.split(".")[-2]: p.dtype for name, p in t5.named_parameters()}
    assert kinds["wo"] == torch.float32 and kinds["wi_0"] == torch.float16


@pytest.mark.parametrize(
    "head",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        [1],
    ],
)
def test_a_header_that_lies_is_one_line(tmp_path: Path, head: Any) -> None:
    text = json.dumps(head).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UserError, match=r"m\.safetensors") as caught:
        header(path)
    assert "\n" not in str(caught.value)
