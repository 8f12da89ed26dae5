"""One frozen base acts teacher, student and proxy, and each stays itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
import tiny_flux
from fewstep.core.types import Cond, UserError
from fewstep.families import flux, sd3
from fewstep.families.lora.alpha import FILE
from fewstep.families.lora.role_files import load_role, save_role
from fewstep.modules.block_transforms import checkpoint_activations, compile_block
from fewstep.modules.lora import LoRARoles, active_role, use_role

pytestmark = pytest.mark.slow(5)

FAMILIES = [sd3, flux]


def net_of(family: ModuleType) -> Any:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family is sd3:
            return SD3Transformer2DModel(**tiny.SMALL).requires_grad_(False)
        return FluxTransformer2DModel(**tiny_flux.NET, guidance_embeds=True).requires_grad_(False)


def blocks_of(net: Any) -> list[Any]:
    return [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]


def inputs(family: ModuleType, rows: int = 2) -> tuple[Any, Any, Cond]:
    generator = torch.Generator().manual_seed(1)
    pooled = 56 if family is sd3 else 24
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    context = torch.randn(rows, 5, 64, generator=generator)
    return (
        x,
        torch.rand(rows, generator=generator),
        Cond(context, torch.randn(rows, pooled, generator=generator)),
    )


def roles_of(family: ModuleType, net: Any, **options: Any) -> LoRARoles:
    return LoRARoles(net, rank=4, targets=family.TARGETS, **options)


def stir(roles: LoRARoles, name: str) -> None:
    """Give a role something to say."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in roles.net(name).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_role_begins_as_the_base_to_the_bit(family: Any, dtype: Any) -> None:
    net = net_of(family).to(dtype)
    velocity, call = family.NetVelocity(net), inputs(family)
    before = velocity(*call)
    roles = roles_of(family, net)
    for name in (None, "student", "proxy"):
        assert torch.equal(roles.velocity(name, velocity)(*call), before)
    assert all(p.dtype == torch.float32 for p in roles.net("student").parameters())
    assert net.dtype == dtype and active_role() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_of_every_block_are_adapted_and_nothing_else(family: Any) -> None:
    net = net_of(family)
    roles = roles_of(family, net)
    adapted = {
        key.removesuffix(".weight") for key, v in roles.merged("student").items() if key.endswith("weight")
    }
    adapted = {path for path in adapted if hasattr(net.get_submodule(path), "roles")}
    linears = {
        path
        for path, layer in net.named_modules()
        if isinstance(layer, torch.nn.Linear) and "blocks." in path and "norm" not in path
    }
    assert adapted == linears and len(adapted) >= 3 * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_roles_net_holds_its_weights_alone_and_the_base_is_held_once(family: Any) -> None:
    net = net_of(family)
    base = {id(p) for p in net.parameters()}
    roles = roles_of(family, net)
    student, proxy = (list(roles.net(name).parameters()) for name in ("student", "proxy"))
    low = {id(p) for p in student + proxy}
    assert len(student) == len(proxy) and len(low) == 2 * len(student)
    assert {id(p) for p in net.parameters()} == base | low and not base & low
    assert [id(p) for p in roles.net("student").parameters()] == [id(p) for p in student]
    assert not any(p.requires_grad for p in net.parameters() if id(p) in base)
    assert not all(torch.equal(p, q) for p, q in zip(student, proxy, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_role_learns_and_the_others_stay(family: Any) -> None:
    net = net_of(family)
    velocity, call = family.NetVelocity(net), inputs(family)
    roles = roles_of(family, net)
    before = {name: roles.velocity(name, velocity)(*call).detach() for name in (None, "proxy")}
    optimizer = torch.optim.SGD(roles.net("student").parameters(), 0.1)
    roles.velocity("student", velocity)(*call).square().mean().backward()
    assert all(p.grad is None for p in roles.net("proxy").parameters())
    optimizer.step()
    for name, was in before.items():
        assert torch.equal(roles.velocity(name, velocity)(*call), was)
    assert not torch.equal(roles.velocity("student", velocity)(*call), before["proxy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_the_role(family: Any) -> None:
    net, plain = net_of(family), net_of(family)
    keys = plain.state_dict().keys()
    roles = roles_of(family, net, alpha=6.0)
    stir(roles, "student")
    velocity, call = family.NetVelocity(net), inputs(family)
    acted = roles.velocity("student", velocity)(*call).detach()
    merged = roles.merged("student")
    assert merged.keys() == keys
    plain.load_state_dict(merged)
    assert torch.allclose(family.NetVelocity(plain)(*call), acted, atol=1e-5)
    assert not torch.allclose(roles.velocity(None, velocity)(*call), acted, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_role_is_a_lora_that_diffusers_reads(family: Any, tmp_path: Path) -> None:
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    roles = roles_of(family, net_of(family), alpha=8.0)
    stir(roles, "student")
    save_role(roles, "student", tmp_path)
    pipeline: Any = StableDiffusion3Pipeline if family is sd3 else FluxPipeline
    read = pipeline.lora_state_dict(tmp_path)  # finds the file and checks that it is a LoRA
    plain = net_of(family)
    merged = roles.merged("student")
    for key in [key for key in read if key.endswith("lora_A.weight")]:
        path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        layer = plain.get_submodule(path)
        b = read[f"transformer.{path}.lora_B.weight"]
        assert isinstance(layer, torch.nn.Linear)
        assert torch.allclose(layer.weight + b @ read[key], merged[f"{path}.weight"], atol=1e-6)
    again = roles_of(family, net_of(family), alpha=8.0)
    load_role(again, "student", tmp_path)
    assert all(torch.equal(merged[key], value) for key, value in again.merged("student").items())


def test_a_scale_in_the_header_is_not_lost(tmp_path: Path) -> None:
    """A LoRA that diffusers' trainers wrote: the same role as with the scale in ``B``."""
    from safetensors.torch import load_file, save_file

    roles = roles_of(sd3, net_of(sd3))
    stir(roles, "student")
    file = save_role(roles, "student", tmp_path)
    tensors = load_file(file)
    merged: list[dict[str, Any]] = []
    for scale, said in ((3.0, {}), (1.0, {"transformer.r": 4, "transformer.lora_alpha": 12})):
        header = {"lora_adapter_metadata": json.dumps(said)} if said else {}
        save_file({k: scale * v if "lora_B" in k else v for k, v in tensors.items()}, file, header)
        again = roles_of(sd3, net_of(sd3))
        load_role(again, "student", tmp_path)
        merged.append(again.merged("student"))
    assert all(torch.allclose(merged[0][key], value, atol=1e-6) for key, value in merged[1].items())
    assert not torch.allclose(
        merged[0]["transformer_blocks.0.attn.to_q.weight"],
        roles.merged("student")["transformer_blocks.0.attn.to_q.weight"],
    )
    save_file(
        tensors,
        file,
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.use_dora": True})},
    )
    with pytest.raises(UserError, match="use_dora"):
        load_role(again, "student", tmp_path)


def test_a_lora_of_another_rank_or_a_broken_one_is_one_line(tmp_path: Path) -> None:
    roles = roles_of(sd3, net_of(sd3))
    save_role(roles, "student", tmp_path)
    with pytest.raises(UserError, match="another rank"):
        load_role(LoRARoles(net_of(sd3), rank=2, targets=sd3.TARGETS), "student", tmp_path)
    (tmp_path / FILE).write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        load_role(roles, "student", tmp_path)


def test_names_and_layers_that_are_not_there_are_refused() -> None:
    net = net_of(sd3)
    with pytest.raises(ValueError, match="no linear layer"):
        LoRARoles(net, targets=("nothing",))
    roles = roles_of(sd3, net)
    with pytest.raises(ValueError, match="none of the adapters"):
        roles.net("critic")
    with pytest.raises(ValueError, match="no linear layer"):
        roles_of(sd3, net)


def gradients(family: Any, again: bool, backend: str | None = None) -> tuple[float, list[Any]]:
    """A student's loss with teacher and proxy called before the backward pass, and its gradients."""
    net = net_of(family)
    roles = roles_of(family, net)
    for name in roles.names:
        stir(roles, name)
    keys = list(net.state_dict())
    for number, block in enumerate(blocks_of(net)):
        if backend and number == 1:  # one block's compilation is long enough
            compile_block(block, backend)
        if again:
            checkpoint_activations(block)
    assert list(net.state_dict()) == keys
    velocity, (x, t, cond) = family.NetVelocity(net), inputs(family)
    roles.net("proxy").requires_grad_(False)
    v = roles.velocity("student", velocity)(x, t, cond)
    with torch.no_grad():
        teacher = roles.velocity(None, velocity)(x, t, cond)
    proxy = roles.velocity("proxy", velocity)(x - v, t, cond)  # its gradient passes on to the student
    loss = (v - teacher).square().mean() + proxy.square().mean()
    with use_role("proxy"):  # whoever acts by then
        loss.backward()
    assert all(p.grad is None for p in roles.net("proxy").parameters())
    return float(loss.detach()), [p.grad for p in roles.net("student").parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recomputed_is_the_role_that_acted(family: Any) -> None:
    (loss, kept), (same_loss, again) = gradients(family, False), gradients(family, True)
    assert loss == pytest.approx(same_loss, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept, again, strict=True))
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in kept)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at its inputs' .grad
def test_compiled_and_recomputed_blocks_learn_the_same() -> None:
    (loss, kept), (same_loss, again) = gradients(sd3, False), gradients(sd3, True, backend="eager")
    assert loss == pytest.approx(same_loss, abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(kept, again, strict=True))
