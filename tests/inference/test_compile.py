"""What makes a picture quick on a GPU, as far as a CPU can tell: what is recorded touches nothing else, few
bits are what they stand for, a norm by channel is the norm, compiled parts are the parts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import tiny_flux
from fewstep.core.types import Cond
from fewstep.families import flux, sd3
from fewstep.families.spec import read
from fewstep.inference.build import ModelBuilder, on_disk
from fewstep.inference.compile import ChannelsLastGroupNorm, compile_decoder, compile_encoder
from fewstep.inference.cuda_graphs import CUDAGraphCache, _CapturedGraph
from fewstep.inference.load import load
from fewstep.inference.materialize import WeightLoader
from fewstep.inference.memory_model import MemoryCosts, StagePeaks
from fewstep.inference.memory_plan import RESIDENCIES, ExecutionConfig, Plan, PlanConstraints, required_bytes
from fewstep.inference.offload import OffloadedModule, PinnedBuffer
from fewstep.inference.offloaded import Codec
from fewstep.inference.options import TorchOptions
from fewstep.inference.quantize import (
    Int4Linear,
    Int8Linear,
    quantize,
    quantize_weight_only,
    quantized_nbytes,
)
from fewstep.inference.sampling_config import build_family
from fewstep.modules.adaln import split_modulation
from fewstep.pipeline.pipeline import Pipeline

pytestmark = pytest.mark.slow(5)


class OnlyThere(TorchDispatchMode):
    """Refuses what a GPU cannot record: to read or make a tensor elsewhere, or a number of one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        held = [v for v in pytree.tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
        away = [tensor for tensor in held if tensor.device.type != self.device]
        assert not away, f"{func} has a tensor on the {away[0].device}"
        return out


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_step_can_be_recorded(kind: str) -> None:
    family: Any = sd3.assemble(tiny.parts(), name="m")
    if kind == "flux":
        family = flux.assemble(tiny_flux.parts("dev"), name="m", steps=3, side=8)
    modulation, body = split_modulation(family.net)
    cond = family.text(["a cat"])
    numbers = sum(layer.out_features for layer in modulation.layers)
    velocity = replace(family.velocity, net=body.to("meta"))
    inputs = torch.zeros(1, *family.latent), torch.zeros(1), cond.context, torch.zeros(1, numbers)
    x, t, context, made = (tensor.to("meta") for tensor in inputs)
    with torch.no_grad(), OnlyThere("meta"):
        assert velocity(x, t, Cond(context, made)).shape == x.shape


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_reading_a_prompt_can_be_recorded(part: str) -> None:
    encoder = tiny.parts()[part].to("meta").eval()
    hidden = {} if part.endswith("3") else {"output_hidden_states": True}
    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    with torch.no_grad(), OnlyThere("meta"):
        out = encoder(ids, **hidden)
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, out)
    assert type(copied) is type(out) and copied[0].shape == out[0].shape
    assert len(copied.get("hidden_states") or ()) == len(out.get("hidden_states") or ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_are_the_nearest_there_are(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 24).to(dtype)
    with torch.no_grad():
        linear.weight[3] = 0.25  # all the same
        linear.weight[4] = 0
    whole = linear.weight.detach().double().clone()
    x = torch.randn(5, 96, dtype=dtype)
    quantize_weight_only(linear, bits)
    assert isinstance(linear, Int8Linear if bits == 8 else Int4Linear)
    unpacked = linear.weight.detach().double()
    group = 96 if bits == 8 else 32  # 64 does not divide a row
    groups = whole.unflatten(1, (-1, group))
    if bits == 8:
        span = groups.abs().amax(-1, keepdim=True) / 127
    else:
        span = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # of scales, and of what is made of them
    away = (unpacked - whole).unflatten(1, (-1, group)).abs()
    assert (away <= span * 0.5 + rounding * groups.abs().amax(-1, keepdim=True)).all()
    assert torch.allclose(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    held = sum(b.nbytes for b in linear.buffers())
    assert held == quantized_nbytes(24, 96, bits, dtype.itemsize)
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_by_channel_is_the_norm(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours = ChannelsLastGroupNorm(4, 16, eps=1e-6)
    ours.load_state_dict(norm.state_dict())
    image = (torch.randn(2, 16, 9, 7) * torch.arange(1, 17)[:, None, None] + 5).to(memory_format=layout)
    with torch.no_grad():
        for x in (image, image.flatten(2)):
            assert torch.allclose(ours(x), norm(x), atol=1e-5)


def test_compiled_parts_are_the_parts() -> None:
    compiled: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(name)
        return graph.forward

    parts = tiny.parts()
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    for part in (*names, "vae"):
        parts[part].eval()
    ids = torch.randint(0, 90, (1, 7))
    latents = torch.randn(1, parts["vae"].config.latent_channels, 8, 8)
    with torch.no_grad():
        words = {name: parts[name](ids)[0] for name in names}
        pixels = parts["vae"].decode(latents)[0]
        for name, expected in words.items():
            before = parts[name].state_dict().keys()
            compile_encoder(parts[name], backend=backend)
            assert torch.allclose(parts[name](ids)[0], expected, atol=1e-5)
            assert parts[name].state_dict().keys() == before
        name = "vae"
        compile_decoder(parts["vae"], backend=backend)
        assert torch.allclose(parts["vae"].decode(latents)[0], pixels, atol=1e-4)
        assert any(isinstance(layer, ChannelsLastGroupNorm) for layer in parts["vae"].modules())
    assert set(compiled) == {*names, "vae"}


# --- parts that leave a GPU; "cpu:0" is the CPU taken for one ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.words.weight
        self.few = nn.Linear(4, 4)
        self.image = nn.Conv2d(2, 2, 3)
        self.image.weight.data = self.image.weight.data.to(memory_format=torch.channels_last)
        quantize_weight_only(self.few, 4)


def gone(module: nn.Module) -> tuple[OffloadedModule, dict[str, torch.Tensor]]:
    """A part that has left once, and what it held."""
    source = WeightLoader(cast("Any", None), "cpu:0", torch.float32)
    part = OffloadedModule(module, source, loaded=True)
    held = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    part.offload()
    return part, held


def test_what_left_a_gpu_comes_back_the_same() -> None:
    part, held = gone(Tied())
    assert not part.loaded
    aside = part.module.image.weight.data_ptr()
    assert part.module.image.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        net = part.load()
        assert part.loaded and net.out.weight is net.words.weight
        assert all(torch.equal(tensor, held[name]) for name, tensor in net.state_dict().items())
        part.offload()
        assert part.module.image.weight.data_ptr() == aside  # it is not copied again


def test_who_is_interrupted_on_the_way_is_still_where_he_was(monkeypatch: pytest.MonkeyPatch) -> None:
    part, held = gone(Tied())
    calls = iter([False, False, True])

    def moved(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        if next(calls, False):
            raise KeyboardInterrupt
        return tensor.clone()

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", moved)
        with pytest.raises(KeyboardInterrupt):
            part.load()
    assert not part.loaded
    assert all(one.owner[one.name].data_ptr() == one.tensor.data_ptr() for one in part._host_tensors)
    assert all(torch.equal(tensor, held[name]) for name, tensor in part.load().state_dict().items())
    fresh = OffloadedModule(Tied(), part.source, loaded=True)

    def refused(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PinnedBuffer, "copy", refused)
        with pytest.raises(MemoryError):
            fresh.offload()
    assert fresh.loaded


def test_a_reading_that_was_broken_off_begins_again() -> None:
    linear = nn.Linear(8, 4)
    whole = linear.weight.detach().clone()
    for _ in range(2):
        quantize(linear, 4, "cuda")
        assert (linear.weight - whole).abs().max() < 0.05


def test_a_shelf_holds_many_in_a_few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.inference.offload.CHUNK", 4096)
    shelf = PinnedBuffer()
    tensors = [torch.randn(n, dtype=torch.bfloat16) for n in (300, 700, 5, 3000, 40)]
    copies = [shelf.copy(tensor) for tensor in tensors]
    assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    pieces = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert sorted(pieces.values()) == [4096, 4096, 6144]  # what is larger than a piece has one of its own


# --- what is recorded ---


class Graph:
    """In a CUDA graph's place: ``replay`` runs what was run while it was recorded."""

    def __init__(self) -> None:
        self.replays = 0
        self.replay: Any = None


def recording(monkeypatch: pytest.MonkeyPatch) -> CUDAGraphCache:
    again = CUDAGraphCache()

    def record(run: Any, inputs: Sequence[torch.Tensor]) -> _CapturedGraph:
        ours = [tensor.clone() for tensor in inputs]
        outputs, graph = run(*ours), Graph()

        def replay() -> None:
            graph.replays += 1
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(run(*ours)), strict=True):
                old.copy_(new)

        graph.replay = replay
        return _CapturedGraph(graph, ours, outputs)

    monkeypatch.setattr(again, "_capture", record)
    return again


def test_what_is_told_again_is_told_of_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    again = recording(monkeypatch)
    one, two = torch.ones(2), torch.full((2,), 5.0)
    first = again("double", lambda x: {"y": 2 * x}, one)
    second = again("double", lambda x: {"y": 2 * x}, two)
    assert torch.equal(first["y"], 2 * one)  # a result is the caller's
    assert torch.equal(second["y"], 2 * two) and torch.equal(one, torch.ones(2))
    assert torch.equal(again("triple", lambda x: 3 * x, one), 3 * one)
    assert len(again._graphs) == 2
    assert again("double", lambda x: {"y": 2 * x}, torch.ones(1))["y"].shape == (1,)
    assert len(again._graphs) == 3  # the smaller one needs no more memory
    again("double", lambda x: {"y": 2 * x}, torch.ones(9))
    assert len(again._graphs) == 1  # the larger one does


# --- what is planned of it ---

SIZES = MemoryCosts(
    weights=lambda part, bits: {"text_encoder": 30, "transformer": 50, "modulation": 20, "vae": 5}[part],
    layer=lambda bits: 2,
    reading=lambda part, bits: 1,
    encoding=lambda part, bits: 3,
    stepping=lambda bits, batch: 7,
    decoding=lambda tiles, batch: 40,
    image_encoding=lambda tiles: 11,
)


def planned(stay: Any, **asked: Any) -> Plan:
    what = PlanConstraints(
        gpu=True, native=16, bits=(16,), text_bits=(16,), batch=1, rows=1, steps=4, latents=(8, 8), **asked
    )
    choice = ExecutionConfig(16, 16, 1, stay, 1)
    return Plan(choice, StagePeaks(what, SIZES, ["text_encoder"], None, "vae", choice).stages(), gpu=True)


def test_a_recording_is_counted_where_the_net_stays() -> None:
    for stay in RESIDENCIES:
        kept = 7 if stay in ("all", "encoders", "net") else 0
        for stage, size in planned(stay).stages.items():
            more = 0 if stage.startswith("reading") else kept
            assert planned(stay, compile=True).stages[stage] == size + more, (stay, stage)


def test_who_comes_first_may_still_be_there_when_a_picture_is_encoded() -> None:
    at = {stay: planned(stay, image=True).stages["encoding the image"] for stay in RESIDENCIES}
    assert at == {"all": 116, "encoders": 96, "net": 96, "codec": 66, "none": 16}


def test_what_decoding_needs_is_spare_until_then() -> None:
    assert planned("encoders").stages["decoding"] == 125
    assert planned("encoders").spare == 125 - 92  # the steps hold 85 + 7
    part = [OffloadedModule(nn.Linear(2, 2, bias=False), cast("Any", None)) for _ in range(4)]  # of 16 bytes
    assembly: Any = ModelBuilder(
        *[cast("Any", None)] * 3, planned("encoders"), None, "cuda", cast("Any", None), True
    )
    assert assembly._spare_layers(part) == part[:2]
    part[0].stays_loaded = True
    assert assembly._spare_layers(part) == part[1:3]
    assert replace(assembly, device="cpu")._spare_layers(part) == []


def test_layers_stay_that_there_is_room_for() -> None:
    plan = replace(planned("encoders"), limit=200)  # of which it needs 125; 10 % are left
    assert plan.with_resident_layers([30, 9, 30, 25]).resident_layers == 2
    filled = plan.with_resident_layers([30, 9, 30, 25])
    assert filled.stages == {stage: size + 55 for stage, size in plan.stages.items()}
    assert required_bytes(filled) <= 200 and filled.spare == plan.spare
    assert "2 layers of the modulations stay" in filled.describe("")[0]
    assert (
        plan.with_resident_layers([1, 57]) == plan and plan.with_resident_layers([1, 2]).resident_layers == 2
    )
    assert replace(planned("all"), limit=900).with_resident_layers([1]).resident_layers == 0
    assert planned("encoders").with_resident_layers([1]).resident_layers == 0


def test_a_codec_makes_room_and_fetches_what_comes_next() -> None:
    said: list[str] = []

    class Layer:
        def offload(self) -> None:
            said.append("go")

        def prefetch(self) -> None:
            said.append("approach")

    class Decoder:
        def acquire(self, name: str) -> Any:
            said.append(name)
            return tiny.parts()["vae"].eval()

    codec = Codec(cast("Any", Decoder()), "vae", 1, (8, 8), 8, cast("Any", [Layer()]))
    codec.decode(torch.zeros(1, tiny.parts()["vae"].config.latent_channels, 8, 8))
    assert said == ["go", "vae", "approach"]


def test_only_what_stays_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=3, guidance=None), tmp_path / "base")
    base = read(tmp_path / "base", sd3.ARCHITECTURE)
    family = build_family(base, None)
    assemble = importlib.import_module("fewstep.inference.build")
    for name in ("compile_blocks", "compile_encoder", "compile_decoder"):
        monkeypatch.setattr(assemble, name, lambda net: None)
    asked = PlanConstraints(True, 32, (32,), (32,), batch=1, rows=1, steps=3, latents=(8, 8), compile=True)
    for stay in RESIDENCIES:
        plan = Plan(ExecutionConfig(32, 32, 1, stay, 1), gpu=True)
        model: Any = ModelBuilder(base, family, asked, plan, None, "cpu:0", on_disk, True).model()
        net = stay in ("all", "encoders", "net")
        assert (model.velocity.graph_cache is not None) == net, stay
        readers = [model.text.encode.parts[name].graph_cache for name in base.encoders]
        assert all((reader is not None) == (stay in ("all", "encoders")) for reader in readers), stay


@pytest.mark.gpu
@pytest.mark.parametrize("stay", RESIDENCIES)
def test_on_a_gpu_what_is_recorded_or_comes_meanwhile_draws_the_same(
    stay: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = importlib.import_module("fewstep.inference.build")
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=3, guidance=2.0), tmp_path / "base")
    plain = Pipeline(load(tmp_path / "base", sd3.ARCHITECTURE, TorchOptions()).model)
    expected = np.asarray(plain("a red apple", seed=1)[0], int)
    for name in ("compile_blocks", "compile_encoder", "compile_decoder"):
        monkeypatch.setattr(assemble, name, lambda net: None)  # what is compiled is another test's
    monkeypatch.setattr("fewstep.inference.memory_plan.RESIDENCIES", (stay,))
    monkeypatch.setattr(Plan, "with_resident_layers", lambda plan, layers: plan)
    model: Any = load(tmp_path / "base", sd3.ARCHITECTURE, TorchOptions(memory="64GiB", compile=True)).model
    ours = Pipeline(model)
    for _ in range(3):
        assert abs(np.asarray(ours("a red apple", seed=1)[0], int) - expected).max() <= 1
    assert bool(model.velocity.graph_cache and model.velocity.graph_cache._graphs) == (
        stay in ("all", "encoders", "net")
    )
    assert all(part.loaded and part._arrival is not None for part in model.codec.meanwhile)
    assert model.codec.meanwhile or stay != "encoders"
