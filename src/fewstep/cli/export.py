"""The command ``fewstep export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.core.optional import need
from fewstep.core.progress import Progress, emit
from fewstep.core.types import UserError
from fewstep.export.common.output_paths import write_errors
from fewstep.export.metadata import facts_of, has_t5, read_metadata
from fewstep.runtime.bundle import LARGEST, Compute

if TYPE_CHECKING:
    from fewstep.export.base import ConvertsBundle, Target
    from fewstep.runtime.bundle import Bundle

UNPACKED = 16
"""Bits that the weights of a bundle have in another one: they have been rounded once."""


def export(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    to: str = "onnx",
    bits: int | None = None,
    t5: str | None = None,
    compute: Compute = "float32",
    lora: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    name: str | None = None,
    steps: int | None = None,
    license: str | None = None,
    metadata: Path | None = None,
) -> None:
    """Write a trained model for the program that shall run it.

    A LICENSE and a model card (README.md) in the source folder go along. An earlier export at the same place
    is replaced.

    Args:
        source: A run's folder, a diffusers folder, a hub name, or a Stability .safetensors file; for openvino
            also a bundle, such as pocket, which needs no PyTorch.
        output: What to write: a folder, or a file where the target is one.
        to: What it is for (docs/deploy.md); onnx is a bundle, which generates without PyTorch.
        bits: Bits a weight. [default: the target's own; 16 of a bundle]
        t5: What becomes of T5: drop, keep, or the bits a weight that it is kept in (bundles for onnx and
            openvino). [default: dropped from bundles]
        compute: What the graphs compute in; bfloat16 and, with 8 or 4 bits, int8 (openvino) are faster on
            processors that multiply them.
        lora: A LoRA to add to the weights, as FILE or FILE:WEIGHT; several options add several.
        name: The model's name; by default what the source calls itself.
        steps: Default number of steps; by default the source's.
        license: Name of the weights' licence, such as Apache-2.0.
        metadata: A JSON object of facts that go along; "styles" lists the style words that the model knows.
    """
    from fewstep.export.base import ConvertsBundle, SupportsComputeDtype, targets
    from fewstep.families.lora.adapters import apply, named, specs

    if steps is not None and not 1 <= steps <= LARGEST:
        raise UserError(f"steps must be 1 to {LARGEST}, not {steps}")
    known = targets()
    if to not in known:
        raise UserError(f"there is no target {to}: give one of {', '.join(known)}")
    target = known[to]
    if bits not in (None, *target.BITS):
        few = ", ".join(map(str, sorted(target.BITS)))
        raise UserError(f"bits for {to} must be one of {few}, not {bits}")
    if compute not in (can := target.COMPUTES if isinstance(target, SupportsComputeDtype) else ("float32",)):
        able = [
            name for name, t in known.items() if isinstance(t, SupportsComputeDtype) and compute in t.COMPUTES
        ]
        raise UserError(
            f"--compute for {to} must be {' or '.join(can)}, not {compute}: that takes --to {', '.join(able)}"
        )
    keeps, its_bits = _t5(t5, to, target)
    more = read_metadata(metadata)
    need(*target.needs(bits or max(target.BITS)))

    from fewstep.pipeline.loading import kind_of, load_family
    from fewstep.pipeline.resolve import bundle_of, parse_family, resolve

    target.check(output)
    place = resolve(parse_family(source)[1])
    if isinstance(target, ConvertsBundle) and (bundle := bundle_of(source)) is not None:
        _check_bundle(source, t5, lora)
        given = {"name": name, "steps": steps, "license": license, "compute": compute}
        _converted(bundle, target, output, bits or UNPACKED, given, more)
        return
    bits = bits or target.BITS[0]
    need("torch", "diffusers", "transformers", *target.needs(bits))
    facts = replace(facts_of(place, license, more), compute=compute)
    loras = specs(lora)
    facts = replace(facts, about={**facts.about, **named(loras)})
    if (kind := kind_of(source)) not in target.FAMILIES:
        raise UserError(f"{source} is of the family {kind}, which cannot be written for {to}")
    if keeps and not has_t5(place):
        raise UserError(f"{source} has no T5: leave --t5 out")
    with Progress() as progress:
        progress(f"loading {source}")
        family = load_family(source, t5=keeps)
        apply(family.parts, family.kind, loras)
        family = replace(family, steps=steps or family.steps, name=name or family.name)
        progress(f"writing {output} for {to}")
        with write_errors(output):
            line = target.export(family, output, bits, facts, **its_bits)
    emit(f"{family.name}: {output}, {line}")


def _check_bundle(source: str, t5: str | None, lora: tuple[str, ...]) -> None:
    """Refuse options that a bundle's weights are too far made for."""
    if t5 is not None:
        raise UserError(f"{source} is a bundle, whose T5 is as it is: leave --t5 out")
    if lora:
        raise UserError(f"{source} is a bundle, and --lora is for PyTorch models: leave it out")


def _converted(
    bundle: Bundle, target: ConvertsBundle, output: Path, bits: int, given: Mapping[str, Any], about: Any
) -> None:
    if bundle.engine != "onnx":
        raise UserError(f"{bundle.folder} is a bundle for {bundle.engine}: give one for onnx")
    told = bundle.to_dict()
    told |= {key: value for key, value in given.items() if value is not None}
    told["about"] = {**told.get("about", {}), **about, "bits": bits}
    with Progress() as progress, write_errors(output):
        progress(f"writing {output}")
        line = target.convert(bundle, output, bits, told)
    emit(f"{told['name']}: {output}, {line}")


def _t5(asked: str | None, to: str, target: Target) -> tuple[bool | None, dict[str, int]]:
    """Whether to load T5 (``None``: where it is there), and what the target is told of its bits.

    Raises:
        UserError: nothing that can be asked, or not of this target.
    """
    from fewstep.export.base import SupportsT5Bits

    few = target.T5_BITS if isinstance(target, SupportsT5Bits) else ()
    if asked is None:
        return (None if target.T5 else False), {}
    if asked == "drop":
        return False, {}
    if asked == "keep" and (few or target.T5):
        return True, {}
    if asked.isdecimal() and int(asked) in few:
        return True, {"t5_bits": int(asked)}
    can = ["drop", *(["keep"] if few or target.T5 else []), *map(str, sorted(few))]
    raise UserError(f"--t5 for {to} must be one of {', '.join(can)}, not {asked}")
