"""A student over its base model (floor 3, torch): another net, or a LoRA added to the base's.

A LoRA is added to the weights when they are read, in float32 and before they are cast or quantized: that is
what :meth:`fewstep.nets.roles.Roles.merged` makes, takes no time and no memory in a step, and loses nothing
to a LoRA beside a quantized weight, which has as large an error of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.families.folder import FACTS, checked_facts, has_part, read_facts, read_json
from fewstep.nets.roles import FILE, PREFIX
from fewstep.staged.outline import Outline, checked
from fewstep.staged.weights import Weights, header
from fewstep.types import Sampler, UserError

ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to a net's weights, as diffusers and our distillation write them.

    Attributes:
        weights: ``transformer.LAYER.lora_A.weight [r, in]`` and ``….lora_B.weight [out, r]``.
        layers: names of the layers.
    """

    weights: Weights
    layers: frozenset[str]

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """``W + B A`` in float32, rounded to the precision that ``W [out, in]`` is stored in."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers or layer == name:
            return weight
        a, b = (self.weights.read(f"{PREFIX}{layer}{end}").float() for end in ENDS)
        return (weight.float() + b @ a).to(weight.dtype)


@dataclass(frozen=True)
class Student:
    """What is laid over a base model.

    Attributes:
        name: what it calls itself.
        steps: that it needs.
        guidance: its scale; ``None`` where it is distilled into the net.
        sampler: how its steps are taken.
        shift: of its grid; ``None`` is the base's.
        t5: whether it hears T5.
        net: folder of its transformer; ``None`` for a LoRA.
        lora: ``None`` for a net.
    """

    name: str
    steps: int
    guidance: float | None
    sampler: Sampler
    shift: float | None
    t5: bool
    net: Path | None = None
    lora: Lora | None = None


def find(name: str, base: Outline) -> Student:
    """A student of ``base``.

    Args:
        name: a run folder (``model`` or ``lora`` is in it), a diffusers folder, or a LoRA's folder or file.
        base: the model that it was distilled from.

    Raises:
        UserError: there is none, it is another model's, or it does not say how it draws.
    """
    place = Path(name)
    for folder in (place, place / "model"):
        if (folder / "model_index.json").is_file():
            return _net(folder, base)
    for file in (place, place / FILE, place / "lora" / FILE):
        if file.is_file() and file.suffix == ".safetensors":
            return _lora(file, base)
    if place.exists():
        raise UserError(f"--student {name} is no student: neither model_index.json nor {FILE} is in it")
    raise UserError(f"there is no student {name}: give a run folder, a diffusers folder or a LoRA")


def _net(folder: Path, base: Outline) -> Student:
    from fewstep.families import family_of

    kind = family_of(folder).__name__.rpartition(".")[2]
    if kind != base.kind:
        raise UserError(f"student {folder} is a {kind}, and the model a {base.kind}: give its own base")
    mine, other = (_shape(c) for c in (base.configs["transformer"], checked(folder / "transformer")))
    unlike = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
    if unlike:
        what = f"its {unlike[0]} is {other.get(unlike[0])}, the model's {mine.get(unlike[0])}"
        raise UserError(f"student {folder} is of another shape than the model: {what}")
    return Student(**_facts(folder, base), net=folder / "transformer")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a net's weights depend on, alike from a file and from Python."""
    plain = {k: list(v) if isinstance(v, tuple | list) else v for k, v in config.items()}
    return {k: v for k, v in plain.items() if v not in (None, [], False)}


def _facts(folder: Path, base: Outline) -> dict[str, Any]:
    """How the student in a diffusers folder draws."""
    facts = read_facts(folder)
    if not facts.get("steps"):
        raise UserError(f"student {folder} does not say its steps: {FACTS} is missing in it")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    clips_alone = base.kind == "sd3" and not has_part(folder, "text_encoder_3")
    return {
        "name": str(facts.get("name") or folder.name),
        "steps": facts["steps"],
        "guidance": facts.get("guidance"),
        "sampler": "renoise" if scheduler.get("stochastic_sampling") else "euler",
        "shift": None if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0)),
        "t5": not clips_alone,
    }


def _lora(file: Path, base: Outline) -> Student:
    """A LoRA; how it draws is said beside it, or by the merged student of its run."""
    entries = header(file)
    layers = {
        key.removeprefix(PREFIX).removesuffix(end) for end in ENDS for key in entries if key.endswith(end)
    }
    wanted = {f"{PREFIX}{layer}{end}" for layer in layers for end in ENDS}
    if not layers or wanted != entries.keys():
        odd = sorted(wanted ^ entries.keys())[:1] or ["no tensor at all"]
        raise UserError(f"{file} is no LoRA of this program's or diffusers' layout: see {odd[0]}")
    shapes = linears(base)
    for layer in sorted(layers):
        a, b = (entries[f"{PREFIX}{layer}{end}"].shape for end in ENDS)
        if layer not in shapes:
            raise UserError(f"{file} is a LoRA of another net: the model has no layer {layer}")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != shapes[layer]:
            what = f"{layer} is {list(shapes[layer])}, the LoRA {list(b)} times {list(a)}"
            raise UserError(f"{file} is a LoRA of another shape: {what}")
    lora = Lora(Weights(file.parent, entries), frozenset(layers))
    beside = file.parent / FACTS
    if beside.is_file():
        return Student(**_told(checked_facts(read_json(beside), beside), beside), lora=lora)
    model = file.parent.parent / "model"
    if (model / "model_index.json").is_file():
        return Student(**_facts(model, base), lora=lora)
    raise UserError(f"{file} does not say its steps: {FACTS} is missing beside it")


def _told(facts: dict[str, Any], place: Path) -> dict[str, Any]:
    sampler = facts.get("sampler", "euler")
    if not facts.get("steps") or sampler not in ("euler", "renoise"):
        raise UserError(f"{place} does not say its steps, or an unknown sampler")
    return {
        "name": str(facts.get("name") or place.parent.name),
        "steps": facts["steps"],
        "guidance": facts.get("guidance"),
        "sampler": sampler,
        "shift": None,
        "t5": bool(facts.get("t5", True)),
    }


def linears(base: Outline) -> dict[str, tuple[int, int]]:
    """Shapes ``(out, in)`` of the linear layers of the base's net."""
    from fewstep.staged.bare import bare

    net = bare(base, "transformer", torch.float32)
    return {
        path: (layer.out_features, layer.in_features)
        for path, layer in net.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
