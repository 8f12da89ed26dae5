"""The command ``fewstep export``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from fewstep.deploy import Facts
from fewstep.deploy.common.place import writing
from fewstep.runtime.bundle import CARD, LARGEST, Compute
from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.deploy import Converter, Target
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
    name: str | None = None,
    steps: int | None = None,
    license: str | None = None,
    about: Path | None = None,
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
        name: The model's name; by default what the source calls itself.
        steps: Default number of steps; by default the source's.
        license: Name of the weights' licence, such as Apache-2.0.
        about: A JSON object of facts that go along; "styles" lists the style words that the model knows.
    """
    from fewstep.deploy import Computer, Converter, targets
    from fewstep.families.folder import read_json

    if steps is not None and not 1 <= steps <= LARGEST:
        raise UserError(f"steps must be 1 to {LARGEST}, not {steps}")
    known = targets()
    if to not in known:
        raise UserError(f"there is no target {to}: give one of {', '.join(known)}")
    target = known[to]
    if bits not in (None, *target.BITS):
        few = ", ".join(map(str, sorted(target.BITS)))
        raise UserError(f"bits for {to} must be one of {few}, not {bits}")
    if compute not in (can := target.COMPUTES if isinstance(target, Computer) else ("float32",)):
        able = [name for name, t in known.items() if isinstance(t, Computer) and compute in t.COMPUTES]
        raise UserError(
            f"--compute for {to} must be {' or '.join(can)}, not {compute}: that takes --to {', '.join(able)}"
        )
    keeps, its_bits = _t5(t5, to, target)

    from fewstep.source import bundle_of, kind_of, load_family

    place = model_of(source)
    if isinstance(target, Converter) and (bundle := bundle_of(place)) is not None:
        if t5 is not None:
            raise UserError(f"{source} is a bundle, whose T5 is as it is: leave --t5 out")
        given = {"name": name, "steps": steps, "license": license, "compute": compute}
        more = {} if about is None else read_json(about)
        _converted(bundle, target, output, bits or UNPACKED, given, more)
        return
    bits = bits or target.BITS[0]
    facts = replace(facts_of(place, license, about), compute=compute)
    if (kind := kind_of(place)) not in target.FAMILIES:
        raise UserError(f"{source} is of the family {kind}, which cannot be written for {to}")
    target.check(output)
    if keeps and not has_t5(place):
        raise UserError(f"{source} has no T5: leave --t5 out")
    family = load_family(place, t5=keeps)
    family = replace(family, steps=steps or family.steps, name=name or family.name)
    with writing(output):
        line = target.export(family, output, bits, facts, **its_bits)
    print(f"{family.name}: {output}, {line}")


def _converted(
    bundle: Bundle, target: Converter, output: Path, bits: int, given: Mapping[str, Any], about: Any
) -> None:
    if bundle.engine != "onnx":
        raise UserError(f"{bundle.folder} is a bundle for {bundle.engine}: give one for onnx")
    target.check(output)
    told = bundle.told()
    told |= {key: value for key, value in given.items() if value is not None}
    told["about"] = {**told.get("about", {}), **about, "bits": bits}
    with writing(output):
        line = target.convert(bundle, output, bits, told)
    print(f"{told['name']}: {output}, {line}")


def _t5(asked: str | None, to: str, target: Target) -> tuple[bool | None, dict[str, int]]:
    """Whether to load T5 (``None``: where it is there), and what the target is told of its bits.

    Raises:
        UserError: nothing that can be asked, or not of this target.
    """
    from fewstep.deploy import Keeper

    few = target.T5_BITS if isinstance(target, Keeper) else ()
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


def has_t5(place: str) -> bool:
    """Whether a model has T5; of what is no folder nobody knows before it is loaded."""
    from fewstep.families.folder import has_part

    folder = Path(place)
    return not (folder / "model_index.json").is_file() or has_part(folder, "text_encoder_3")


def model_of(source: str) -> str:
    """The model of a run's folder; any other source as it is."""
    model = Path(source) / "model"
    return str(model) if (model / "model_index.json").is_file() else source


def facts_of(place: str, license: str | None, about: Path | None) -> Facts:
    """What an export of the model at ``place`` tells of itself."""
    from fewstep.families.folder import read_json

    text = Path(place) / "LICENSE"
    given = text if text.is_file() else None
    card = Path(place) / CARD
    told = {} if about is None else read_json(about)
    styles = told.get("styles", [])
    if not (isinstance(styles, list) and all(isinstance(style, str) for style in styles)):
        raise UserError(f'{about}: "styles" must be a list of words')
    name = license or ("unknown" if given is None else "see LICENSE")
    return Facts(name, given, told, card if card.is_file() else None)
