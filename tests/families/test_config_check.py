"""A stranger's diffusers folder is believed no size, no type and no class."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from fewstep.cli.app import run
from fewstep.core.types import UserError
from fewstep.families import diffusers_io, sd3
from fewstep.families.config_check import check_class, is_plain
from fewstep.families.registry import built_in
from fewstep.pipeline import loading

pytestmark = pytest.mark.slow(5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model"
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=2, guidance=None), path)
    return path


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(autouse=True)
def bounded() -> Generator[None]:
    """Memory may grow by 2 GiB."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    lines = Path("/proc/self/status").read_text().splitlines()
    held = int(next(line for line in lines if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NET, VAE, CLIP = "transformer/config.json", "vae/config.json", "text_encoder/config.json"
TIMES, WORDS = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
WRONG: list[tuple[str, str, Any]] = [
    (TIMES, "num_train_timesteps", 10**9),
    (TIMES, "num_train_timesteps", -1),
    (TIMES, "shift", "3"),
    (TIMES, "shift", 0),
    (TIMES, "use_dynamic_shifting", "yes"),
    (NET, "num_layers", 10**9),
    (NET, "num_layers", None),
    (NET, "sample_size", 10**9),
    (NET, "sample_size", [8, 8]),
    (NET, "patch_size", 0),
    (NET, "pos_embed_max_size", 4096),
    (NET, "attention_head_dim", 2**19),
    (NET, "dual_attention_layers", [0] * 10**5),
    (NET, "num_attention_heads", {}),
    (VAE, "block_out_channels", []),
    (VAE, "block_out_channels", [64] * 1000),
    (VAE, "layers_per_block", 10**9),
    (VAE, "scaling_factor", 0),
    (VAE, "scaling_factor", None),
    (VAE, "norm_num_groups", 0),
    (VAE, "norm_num_groups", 7),
    (VAE, "down_block_types", ["NoBlock"] * 4),
    (VAE, "act_fn", "none"),
    (CLIP, "vocab_size", 2**20),
    (CLIP, "hidden_size", 2**18),
    (CLIP, "num_hidden_layers", 10**9),
    (CLIP, "max_position_embeddings", 10**9),
    (CLIP, "num_attention_heads", 5),
    (CLIP, "hidden_act", "none"),
    (WORDS, "model_max_length", 0),
    (WORDS, "model_max_length", "many"),
    (WORDS, "added_tokens_decoder", {"-1": {}}),
]


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_a_wrong_configuration_is_one_line_to_both_readers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, value: Any
) -> None:
    edit(model / name, **{key: value})
    with pytest.raises(UserError, match=name.partition("/")[0]) as caught:
        loading.load_family(str(model)).text(["a cat"])
    assert "\n" not in str(caught.value)
    assert run(["generate", "a cat", "--model", str(model), "-o", str(tmp_path / "x.png")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fewstep: ") and not (tmp_path / "x.png").exists()


ODD = (
    "pipeline",
    "logging",
    "__name__",
    "AutoModel",
    "BertModel",
    "PretrainedConfig",
    "NoSuch",
    "",
    "a.b",
    "\0",
    "CLIPVisionModel",
    "StableDiffusionPipeline",
    "UNet2DModel",
    "T5Model",
    "load_image",
    "TrainingArguments",
)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_class_that_cannot_be_that_part_is_one_line(model: Path, part: str) -> None:
    for library in ("diffusers", "transformers"):
        for name in ODD:
            edit(model / "model_index.json", **{part: [library, name]})
            with pytest.raises(UserError) as caught:
                loading.load_family(str(model))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry", [["diffusers"], ["os", "system"], "AutoencoderKL", 7, [1, 2], [["a"], "b"], {}]
)
def test_an_entry_that_names_no_class_is_one_line(model: Path, entry: Any) -> None:
    edit(model / "model_index.json", vae=entry)
    with pytest.raises(UserError):
        loading.load_family(str(model))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``evil`` that can be imported, and the file that it writes then."""
    written = tmp_path / "canary"
    (tmp_path / "code").mkdir()
    (tmp_path / "code/evil.py").write_text(
        f"open({str(written)!r}, 'w').close()\nclass SD3Transformer2DModel: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return written


LIBRARIES = ("evil", "", ".", "os", "fewstep", "diffusers.models", "transformers\0", "..evil")
ALL_PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_3",
    "tokenizer",
    "scheduler",
    "image_encoder",
)


@pytest.mark.parametrize("part", ALL_PARTS)
def test_no_reader_imports_a_library_that_a_folder_names(
    model: Path, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    from fewstep.bench.engines import DIFFUSERS, Spec, find

    for library in LIBRARIES:
        for name in ("SD3Transformer2DModel", ""):
            edit(model / "model_index.json", **{part: [library, name]})
            assert run(["generate", "a cat", "--model", str(model), "-o", str(tmp_path / "x.png")]) == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith("fewstep: ") and "model_index.json" in last
            for reader in (
                lambda: loading.load_family(str(model)),
                lambda: find(DIFFUSERS)(Spec(str(model), 1, 1)),
            ):
                with pytest.raises(UserError, match=r"model_index\.json"):
                    reader()
    assert not canary.exists() and not (tmp_path / "x.png").exists()


def test_no_outline_makes_a_net_of_another_library(canary: Path) -> None:
    from fewstep.families.presets import SD35_MEDIUM
    from fewstep.inference.meta_init import init_from_config

    for library in LIBRARIES:
        named = {**SD35_MEDIUM.classes, "transformer": (library, "SD3Transformer2DModel")}
        with pytest.raises(UserError, match="only diffusers and transformers"):
            init_from_config(replace(SD35_MEDIUM, classes=named), "transformer")
    assert not canary.exists()


OTHERS: list[dict[str, Any]] = [
    {"_class_name": "FluxPipeline"},
    {"_class_name": "StableDiffusion3PAGPipeline"},
    {"_class_name": "StableDiffusion3PAGImg2ImgPipeline"},
    {"_class_name": "StableDiffusion3ControlNetPipeline"},
    {"_class_name": "StableDiffusion3ControlNetInpaintingPipeline"},
    {"_class_name": "StableDiffusion3"},
    {"transformer": ["diffusers", "FluxTransformer2DModel"]},
    {"text_encoder": ["transformers", "CLIPTextModel"]},
    {"text_encoder_2": ["transformers", "T5EncoderModel"]},
    {"text_encoder_3": ["transformers", "CLIPTextModelWithProjection"]},
]


@pytest.mark.parametrize("changes", OTHERS)
def test_another_pipelines_classes_are_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    edit(model / "model_index.json", **changes)
    assert run(["generate", "a cat", "--model", str(model), "-o", str(tmp_path / "x.png")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    value = next(iter(changes.values()))
    assert (value if isinstance(value, str) else value[1]) in line or "FluxPipeline" in line
    with pytest.raises(UserError):
        loading.load_family(str(model))


@pytest.mark.parametrize(
    ("pipeline", "part", "name"),
    [
        ("FluxPipeline", "transformer", "SD3Transformer2DModel"),
        ("FluxPipeline", "text_encoder", "CLIPTextModelWithProjection"),
        ("FluxPipeline", "text_encoder_2", "CLIPTextModel"),
        ("StableDiffusion3Pipeline", "transformer", "FluxTransformer2DModel"),
        ("StableDiffusion3Pipeline", "text_encoder_3", "CLIPTextModel"),
    ],
)
def test_each_family_has_its_own_classes(pipeline: str, part: str, name: str) -> None:
    library = "diffusers" if part == "transformer" else "transformers"
    family = next(each for each in built_in().values() if each.pipeline == pipeline)
    with pytest.raises(UserError, match=f"{name} for {part} of a {pipeline}"):
        check_class((library, name), part, "index", family)
    check_class((library, family.nets[part][0]), part, "index", family)


def test_pipelines_with_more_in_them_are_not_plain() -> None:
    import diffusers

    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    for stem in ("StableDiffusion3", "Flux"):
        same = {name for name in names if is_plain(name, f"{stem}Pipeline")}
        assert same == {f"{stem}Pipeline", f"{stem}Img2ImgPipeline", f"{stem}InpaintPipeline"}


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_pipelines_that_draw_the_same_of_a_text_are_read(model: Path, kind: str) -> None:
    edit(model / "model_index.json", _class_name=f"StableDiffusion3{kind}Pipeline")
    assert loading.load_family(str(model)).kind == "sd3"


def test_weights_of_another_shape_are_not_made_up(model: Path) -> None:
    """transformers fills them with fresh ones, and says so in a table that nobody reads."""
    edit(model / CLIP, intermediate_size=40)
    with pytest.raises(UserError, match="text_encoder"):
        loading.load_family(str(model))


def test_an_index_names_files_in_its_folder_alone(model: Path) -> None:
    from fewstep.families.safetensors_weights import Weights

    net = model / "transformer"
    (net / "diffusion_pytorch_model.safetensors").rename(model / "weights.safetensors")
    index = net / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../weights.safetensors", str(model / "weights.safetensors")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
        with pytest.raises(UserError, match=r"no \.safetensors file beside it"):
            Weights.open(net)


def test_every_class_of_the_families_has_a_shape() -> None:
    for family in built_in().values():
        parts = {each.part for each in family.net_classes.values()}
        assert parts >= {part.rstrip("_23") for part in family.required if part in family.nets}
        assert {name for names in family.nets.values() for name in names} <= family.net_classes.keys()


def test_a_full_disk_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    family = sd3.load(model)
    monkeypatch.setattr(StableDiffusion3Pipeline, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        sd3.save(family, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_facts_of_another_type_are_one_line(model: Path) -> None:
    for facts in (
        {"steps": "4"},
        {"steps": 10**9},
        {"name": [1]},
        {"shift": 0},
        {"t5": "no"},
        {"guidance": {}},
    ):
        (model / diffusers_io.FACTS).write_text(json.dumps(facts))
        with pytest.raises(UserError, match=r"fewstep\.json"):
            loading.load_family(str(model))


def test_what_transformers_leaves_out_is_its_default(model: Path) -> None:
    """It writes what differs from a class's defaults."""
    from fewstep.families.spec import read_config

    path = model / CLIP
    told = json.loads(path.read_text())
    del told["max_position_embeddings"], told["vocab_size"]
    path.write_text(json.dumps(told))
    found = read_config(model / "text_encoder", "CLIPTextModelWithProjection")
    assert (found["max_position_embeddings"], found["vocab_size"]) == (77, 49408)
