"""A distilled student of a base model: another net, or a LoRA.

A LoRA is added to the weights when they are read, in float32 and before they are cast or quantized, as in
:meth:`fewstep.modules.lora.LoRARoles.merged`. It then costs no time and no memory in a step. The rounding
error is that of a LoRA beside a quantized weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

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
"""LoRA updates by part and layer."""


@dataclass(frozen=True)
class AddLoras:
    """Adds LoRAs to the weights of one part (:data:`fewstep.inference.materialize.WeightUpdate`).

    Attributes:
        student: the student's LoRA, rounded to the stored precision, as its run merges it.
        others: further LoRAs, rounded to the precision of the net's arithmetic.
    """

    student: Updates
    others: Updates

    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``W + sum(scale B A)``."""
        layer, _, end = name.rpartition(".")
        if end != "weight":
            return weight
        if layer in self.student:
            weight = adapters.added(weight, self.student[layer], weight.dtype)
        return adapters.added(weight, self.others[layer], dtype) if layer in self.others else weight


def updates_of(part: str, student: Student | None, loras: PartUpdates) -> AddLoras | None:
    """Return the LoRAs of a part; ``None`` if there are none."""
    own = {} if student is None else student.lora.get(part, {})
    others = loras.get(part, {})
    return AddLoras(own, others) if own or others else None


def read_loras(loras: Sequence[str], base: ModelSpec) -> PartUpdates:
    """Read LoRAs for a model. Unused tensors give a warning.

    Args:
        loras: the LoRAs, each ``FILE[:WEIGHT]``.
        base: the model.

    Raises:
        UserError: one is missing, damaged, for another model, or of an unsupported kind.
    """
    return adapters.updates_of(loras, base.architecture, shapes_of(base)) if loras else {}


def shapes_of(base: ModelSpec) -> Callable[[str], Shapes | None]:
    """Return a function of a part that returns the shapes of its layers; ``None`` for a missing part."""
    from fewstep.inference.meta_init import init_on_meta

    def shapes(part: str) -> Shapes | None:
        return shapes_of_net(init_on_meta(base, part, torch.float32)) if part in base.configs else None

    return cache(shapes)


class _SamplingFacts(TypedDict):
    """The fields of :class:`Student` that a folder or file states."""

    name: str
    steps: int
    guidance: float | None
    sampler: Sampler
    schedule: Schedule | None
    t5: bool


@dataclass(frozen=True)
class Student:
    """A distilled student of a base model.

    Attributes:
        name: its name.
        steps: number of sampling steps.
        guidance: guidance scale; ``None`` if guidance is distilled into the net.
        sampler: the sampler.
        schedule: its schedule; ``None`` is the base's with this sampler.
        t5: whether it is conditioned on T5.
        net: folder of its transformer; ``None`` for a LoRA.
        lora: updates of a LoRA; empty for a net.
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
    """Load a student of ``base``.

    Args:
        name: a run folder (with ``model`` or ``lora``), a diffusers folder, or a LoRA's folder or file.
        base: the model that it is distilled from.

    Raises:
        UserError: it is missing, belongs to another model, or lacks its sampling configuration.
    """
    path = Path(name)
    for folder in (path, path / "model"):
        if (folder / "model_index.json").is_file():
            return _net(folder, base)
    for file in (path, path / FILE, path / PEFT_FILE, path / "lora" / FILE):
        if file.is_file() and file.suffix == ".safetensors":
            return _lora(file, base)
    if (reason := unfinished(path)) is not None:
        raise UserError(reason)
    if path.exists():
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


def _shape(config: Mapping[str, object]) -> dict[str, object]:
    """Normalize the configuration of a net, so that a file and Python give the same values."""
    plain = {k: list(v) if isinstance(v, tuple | list) else v for k, v in config.items()}
    return {k: v for k, v in plain.items() if v not in (None, [], False)}


def _facts(folder: Path, base: ModelSpec) -> _SamplingFacts:
    """Read the sampling configuration of a student in a diffusers folder."""
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
    """Load a LoRA with the sampling configuration beside it, or that of the merged student of its run."""
    adapter = read(file)
    layers_by_part, unmatched = resolve(adapter, base.architecture, shapes_of(base))
    if unmatched:
        raise UserError(f"{file} is a LoRA of another net: the model has no layer {unmatched[0]}")
    for note in adapter.notes:
        warnings.warn(f"{file}: {note}", adapters.LoraWarning, stacklevel=2)
    updates = {
        part: {at: [update] for at, update in layers.items()} for part, layers in layers_by_part.items()
    }
    facts = file.parent / FACTS
    if facts.is_file():
        return Student(**_parse_facts(checked_facts(read_json(facts), facts), facts), lora=updates)
    model = file.parent.parent / "model"
    if (model / "model_index.json").is_file():
        return Student(**_facts(model, base), lora=updates)
    raise UserError(f"{file} does not say its steps: {FACTS} is missing beside it")


def _parse_facts(facts: Mapping[str, Any], place: Path) -> _SamplingFacts:
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
