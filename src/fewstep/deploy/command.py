"""The command ``fewstep export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fewstep.types import UserError


def export(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    to: Literal["bundle", "diffusers"] = "bundle",
    bits: Literal[8, 16, 32] | None = None,
    name: str | None = None,
    steps: int | None = None,
    license: str | None = None,
    about: Path | None = None,
) -> None:
    """Make a bundle, which generates without PyTorch, from a trained model.

    T5 stays out of a bundle. A LICENSE file in the source folder goes along.

    Args:
        source: A diffusers folder, a hub name, or a Stability .safetensors file.
        output: The folder to write.
        to: A bundle, or a diffusers folder that stock pipelines load.
        bits: Bits a weight, in a bundle. [default: 8]
        name: The model's name; by default what the source calls itself.
        steps: Default number of steps; by default the source's.
        license: Name of the weights' licence, such as Apache-2.0.
        about: A JSON object of facts for bundle.json; "styles" lists the style words that the model knows.
    """
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if to == "diffusers" and bits not in (None, 32):
        raise UserError("a diffusers folder is written at 32 bits: leave out --bits, or export a bundle")
    facts = _facts(about)

    from fewstep.families import sd3

    family = sd3.load(source, t5=False if to == "bundle" else None, name=name)
    family = replace(family, steps=steps or family.steps)
    if to == "diffusers":
        from fewstep.deploy import diffusers

        diffusers.export(family, output)
        print(f"{family.name}: {output}")
        return
    from fewstep.deploy import onnx

    bits = bits or 8
    text = Path(source) / "LICENSE"
    bundle = onnx.export(
        family,
        output,
        bits=bits,
        license=license or ("see LICENSE" if text.is_file() else "unknown"),
        license_file=text if text.is_file() else None,
        about=facts,
    )
    print(f"{bundle.name}: {output}, {bundle.size / 1e6:.1f} MB, {bits}-bit weights")


def _facts(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from fewstep.families.folder import read_json

    return read_json(path)
