"""A student over its base model (floor 3, torch): another net, or a LoRA added to the base's.

A LoRA is added to the weights when they are read, in float32 and before they are cast or quantized: that is
what :meth:`fewstep.modules.lora.LoRARoles.merged` makes, takes no time and no memory in a step, and loses
nothing to a LoRA beside a quantized weight, which has as large an error of rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.run_folder import unfinished
from fewstep.core.types import Sampler, UserError
from fewstep.families import schedulers
from fewstep.families.diffusers_io import FACTS, checked_facts, has_part, read_facts, read_json
from fewstep.families.lora import adapters
from fewstep.families.lora.alpha import FILE, PEFT_FILE
from fewstep.families.lora.file import read
from fewstep.families.lora.layers import Shapes, Updates, resolve
from fewstep.families.lora.layers import shapes_of as shapes_of_net
from fewstep.families.registry import architecture_of
from fewstep.families.schedulers import Schedule
from fewstep.families.spec import ModelSpec, read_config

PartUpdates = Mapping[str, Updates]
"""Part -> layer -> what is added to its weight."""


@dataclass(frozen=True)
class AddLoras:
    """What LoRAs do to the weights of one part (:data:`fewstep.inference.materialize.Change`).

    Attributes:
        student: the student's own, rounded to the precision that weights are stored in, as its run merges it.
        others: laid over that, and rounded to the precision that the net computes in.
    """

    student: Updates
    others: Updates

    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """``W + sum(scale B A)``."""
        layer, _, end = name.rpartition(".")
        if end != "weight":
            return weight
        if layer in self.student:
            weight = adapters.added(weight, self.student[layer], weight.dtype)
        return adapters.added(weight, self.others[layer], dtype) if layer in self.others else weight


def change_of(part: str, student: Student | None, loras: PartUpdates) -> AddLoras | None:
    """What is done to the weights of a part, if anything."""
    own = {} if student is None else student.lora.get(part, {})
    others = loras.get(part, {})
    return AddLoras(own, others) if own or others else None


def loras_of(given: Sequence[str], base: ModelSpec) -> PartUpdates:
    """What LoRAs add to a model; what cannot be used of them is warned of.

    Args:
        given: ``FILE[:WEIGHT]`` of each.
        base: the model.

    Raises:
        UserError: one is missing, damaged, another model's, or not followed.
    """
    return adapters.updates_of(given, base.architecture, shapes_of(base)) if given else {}


def shapes_of(base: ModelSpec) -> Callable[[str], Shapes | None]:
    """Part -> the layers that a LoRA may change; ``None`` for a part that the model has not."""
    from fewstep.inference.meta_init import init_on_meta

    def shapes(part: str) -> Shapes | None:
        return shapes_of_net(init_on_meta(base, part, torch.float32)) if part in base.configs else None

    return cache(shapes)


@dataclass(frozen=True)
class Student:
    """What is laid over a base model.

    Attributes:
        name: what it calls itself.
        steps: that it needs.
        guidance: its scale; ``None`` where it is distilled into the net.
        sampler: how its steps are taken.
        schedule: its scheduler's; ``None`` is the base's with this sampler.
        t5: whether it hears T5.
        net: folder of its transformer; ``None`` for a LoRA.
        lora: what a LoRA adds; empty for a net.
    """

    name: str
    steps: int
    guidance: float | None
    sampler: Sampler
    schedule: Schedule | None
    t5: bool
    net: Path | None = None
    lora: PartUpdates = field(default_factory=dict[str, Updates])


def load_student(name: str, base: ModelSpec) -> Student:
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
    for file in (place, place / FILE, place / PEFT_FILE, place / "lora" / FILE):
        if file.is_file() and file.suffix == ".safetensors":
            return _lora(file, base)
    if (why := unfinished(place)) is not None:
        raise UserError(why)
    if place.exists():
        raise UserError(f"--student {name} is no student: neither model_index.json nor {FILE} is in it")
    raise UserError(f"there is no student {name}: give a run folder, a diffusers folder or a LoRA")


def _net(folder: Path, base: ModelSpec) -> Student:
    ours, its = base.architecture, architecture_of(folder, base.architecture)
    if its is not ours:
        raise UserError(
            f"student {folder} is of the family {its.name}, the model of {ours.name}: give its own base"
        )
    config = read_config(folder / "transformer", classes=ours.net_classes)
    mine, other = (_shape(c) for c in (base.configs["transformer"], config))
    unlike = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
    if unlike:
        what = f"its {unlike[0]} is {other.get(unlike[0])}, the model's {mine.get(unlike[0])}"
        raise UserError(f"student {folder} is of another shape than the model: {what}")
    return Student(**_facts(folder, base), net=folder / "transformer")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a net's weights depend on, alike from a file and from Python."""
    plain = {k: list(v) if isinstance(v, tuple | list) else v for k, v in config.items()}
    return {k: v for k, v in plain.items() if v not in (None, [], False)}


def _facts(folder: Path, base: ModelSpec) -> dict[str, Any]:
    """How the student in a diffusers folder draws."""
    facts = read_facts(folder)
    if not facts.get("steps"):
        raise UserError(f"student {folder} does not say its steps: {FACTS} is missing in it")
    schedule = schedulers.read(folder / "scheduler")
    t5 = all(has_part(folder, part) for part in base.architecture.optional)
    return {
        "name": str(facts.get("name") or folder.name),
        "steps": facts["steps"],
        "guidance": facts.get("guidance"),
        "sampler": "renoise" if schedule.stochastic_sampling else "euler",
        "schedule": schedule,
        "t5": t5,
    }


def _lora(file: Path, base: ModelSpec) -> Student:
    """A LoRA; how it draws is said beside it, or by the merged student of its run."""
    adapter = read(file)
    found, left = resolve(adapter, base.architecture, shapes_of(base))
    if left:
        raise UserError(f"{file} is a LoRA of another net: the model has no layer {left[0]}")
    for note in adapter.notes:
        warnings.warn(f"{file}: {note}", adapters.LoraWarning, stacklevel=2)
    updates = {part: {at: [update] for at, update in layers.items()} for part, layers in found.items()}
    beside = file.parent / FACTS
    if beside.is_file():
        return Student(**_told(checked_facts(read_json(beside), beside), beside), lora=updates)
    model = file.parent.parent / "model"
    if (model / "model_index.json").is_file():
        return Student(**_facts(model, base), lora=updates)
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
        "schedule": None,
        "t5": bool(facts.get("t5", True)),
    }
