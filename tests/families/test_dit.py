"""The family without text and codec: class names, pixels, and diffusers' own net."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from fewstep.cli.app import run
from fewstep.core import sampling
from fewstep.core.guidance import Guided
from fewstep.core.types import UserError
from fewstep.families.base import Family
from fewstep.families.dit import ARCHITECTURE
from fewstep.families.registry import architecture_of
from fewstep.pipeline.loading import load, load_family
from tiny import assert_batch_does_not_matter

CLASSES = ("cup", "saucer", "spoon")


def parts(**config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1,
        "num_layers": 2, "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3,
    }  # fmt: skip
    net = DiTTransformer2DModel(**usual | config)
    return {"transformer": net, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def family(**config: Any) -> Family:
    return ARCHITECTURE.assemble(parts(**config), name="crockery", classes=CLASSES)


def noise(count: int) -> torch.Tensor:
    return torch.from_numpy(sampling.batch_noise(range(count), (1, 8, 8)))


def test_the_velocity_is_diffusers_own_forward() -> None:
    model, t = family(), torch.tensor([0.3, 0.74925])
    with torch.no_grad():
        own = model.velocity(noise(2), t, model.text(["spoon", "cup"]))
        net = model.net(noise(2), timestep=1000 * t, class_labels=torch.tensor([2, 0])).sample
    assert torch.equal(own, net)


def test_an_image_does_not_depend_on_its_batch() -> None:
    assert_batch_does_not_matter(family(), ["cup", "spoon"])


def test_names_are_numbers_and_none_is_the_class_of_guidance() -> None:
    context = family().text(["cup", " SPOON ", ""]).context
    assert context.shape == (3, 1, 1) and context.flatten().tolist() == [0, 2, 3]
    with pytest.raises(UserError, match="'fork' is none of cup, saucer, spoon"):
        family().text(["fork"])


def test_guidance_1_is_the_class_alone_and_0_none() -> None:
    model, t = family(), torch.full((2,), 0.5)
    cond, null = model.text(["cup", "spoon"]), model.text([""])
    with torch.no_grad():
        alone = model.velocity(noise(2), t, cond)
        assert torch.allclose(Guided(model.velocity, null, 1.0)(noise(2), t, cond), alone)
        none = model.velocity(noise(2), t, model.text(["", ""]))
        assert torch.allclose(Guided(model.velocity, null, 0.0)(noise(2), t, cond), none, atol=1e-6)
        assert not torch.allclose(none, alone)


def test_a_net_in_training_keeps_its_labels() -> None:
    """diffusers' net drops a tenth of them; recipes do that once per sample."""
    model = family()
    net = copy.deepcopy(model.net).train()
    velocity = type(model.velocity)(net)  # type: ignore[call-arg]
    cond, t = model.text(["cup"] * 200), torch.full((200,), 0.5)
    with torch.no_grad():
        v = velocity(noise(1).expand(200, -1, -1, -1), t, cond)
    assert (v - v[:1]).abs().max() < 1e-6


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    model = family()
    model.save(tmp_path / "model")
    assert architecture_of(tmp_path / "model") is ARCHITECTURE
    again = load_family(str(tmp_path / "model"))
    assert again.text(["saucer"]).context.flatten().tolist() == [1]
    assert (again.name, again.guidance, again.steps, again.latent) == ("crockery", 2.0, 16, (1, 8, 8))
    with torch.no_grad():
        t = torch.full((2,), 0.5)
        pair = [each.velocity(noise(2), t, each.text(["cup", ""])) for each in (model, again)]
    assert torch.equal(*pair)


def test_a_student_keeps_names_and_loses_guidance(tmp_path: Path) -> None:
    model = family()
    student = model.student(copy.deepcopy(model.net), "few", 4)
    student.save(tmp_path / "model")
    again = load_family(str(tmp_path / "model"))
    assert (again.steps, again.guidance) == (4, None)
    assert again.text(["spoon"]).context.flatten().tolist() == [2]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_latents(channels: int) -> None:
    model = family(in_channels=channels, out_channels=channels)
    latents = torch.randn(2, channels, 8, 8)
    decoded = model.codec.decode(latents)
    assert decoded.shape == (2, 3, 8, 8)
    assert torch.allclose(model.codec.encode(decoded), latents, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        ({"out_channels": 2}, CLASSES, "takes 1 or 3 channels and gives as many, not 1 channels to 2"),
        ({"in_channels": 4, "out_channels": 4}, CLASSES, "takes 1 or 3 channels"),
        ({}, ("cup",), "the net has 3 classes, but 1 names are given"),
    ],
)
def test_nets_of_another_kind_are_refused(
    config: dict[str, Any], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ARCHITECTURE.assemble(parts(**config), name="x", classes=classes)


def test_classes_without_names_are_numbers() -> None:
    model = ARCHITECTURE.assemble(parts(), name="x")
    assert model.text(["1"]).context.item() == 1


def test_it_generates_and_refuses_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "model")
    family().save(place)
    words = ["generate", "--model", place, "-o", str(tmp_path / "image.png")]
    assert run([*words, "cup", "--num-images", "2", "--seed", "5"]) == 0
    image = np.asarray(load(place)("spoon", seed=5)[0])
    assert image.shape == (8, 8, 3)
    assert (tmp_path / "image-2.png").is_file()
    capsys.readouterr()
    for more, message in (
        (["fork"], "'fork' is none of cup, saucer, spoon"),
        (["cup", "--memory", "1GiB"], "--memory is for models with an autoencoder"),
        (["cup", "--size", "16x16"], "--size is for models with an autoencoder"),
    ):
        assert run([*words, *more]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
