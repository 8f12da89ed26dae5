"""What makes a picture quick on a GPU, as far as a CPU can tell: what is recorded touches nothing else, few
bits are what they stand for, a norm by channel is the norm, compiled parts are the parts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import tiny_flux
from fewstep.families import flux, sd3
from fewstep.nets.hoist import hoisted
from fewstep.pipeline import Pipeline
from fewstep.staged import Wish
from fewstep.staged.blocks import ByChannel, compile_decoder, compile_encoder
from fewstep.staged.load import load
from fewstep.staged.plan import STAYS
from fewstep.staged.quantize import InBytes, InNibbles, in_bytes, pack
from fewstep.types import Cond


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
    modulation, body = hoisted(family.net)
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
    pack(linear, bits)
    assert isinstance(linear, InBytes if bits == 8 else InNibbles)
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
    assert held == in_bytes(24, 96, bits, dtype.itemsize)
    assert [name for name, _ in linear.named_parameters()] == ["bias"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_by_channel_is_the_norm(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours = ByChannel(4, 16, eps=1e-6)
    ours.load_state_dict(norm.state_dict())
    image = (torch.randn(2, 16, 9, 7) * torch.arange(1, 17)[:, None, None] + 5).to(memory_format=layout)
    with torch.no_grad():
        for x in (image, image.flatten(2)):
            assert torch.allclose(ours(x), norm(x), atol=1e-5)


def test_compiled_parts_are_the_parts() -> None:
    parts = tiny.parts()
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        parts[part].eval()
    ids = torch.randint(0, 90, (1, 7))
    latents = torch.randn(1, parts["vae"].config.latent_channels, 8, 8)
    with torch.no_grad():
        words = {name: parts[name](ids)[0] for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        pixels = parts["vae"].decode(latents)[0]
        for name, expected in words.items():
            before = parts[name].state_dict().keys()
            compile_encoder(parts[name], backend="eager")
            assert torch.allclose(parts[name](ids)[0], expected, atol=1e-5)
            assert parts[name].state_dict().keys() == before
        compile_decoder(parts["vae"], backend="eager")
        assert torch.allclose(parts["vae"].decode(latents)[0], pixels, atol=1e-4)
        assert any(isinstance(layer, ByChannel) for layer in parts["vae"].modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stay", STAYS)
def test_on_a_gpu_what_is_recorded_or_comes_meanwhile_draws_the_same(
    stay: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = importlib.import_module("fewstep.staged.assemble")
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=3, guidance=2.0), tmp_path / "base")
    plain = Pipeline(load(tmp_path / "base", "sd3", Wish()).model)
    expected = np.asarray(plain("a red apple", seed=1)[0], int)
    for name in ("compile_blocks", "compile_encoder", "compile_decoder"):
        monkeypatch.setattr(assemble, name, lambda net: None)  # what is compiled is another test's
    monkeypatch.setattr("fewstep.staged.plan.STAYS", (stay,))
    ours = Pipeline(load(tmp_path / "base", "sd3", Wish(memory="64GiB", compile=True)).model)
    for _ in range(3):
        assert abs(np.asarray(ours("a red apple", seed=1)[0], int) - expected).max() <= 1
