"""The export of a model to a target: checks of the options, loading and writing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.core.optional import need
from fewstep.core.progress import Progress
from fewstep.core.types import UserError
from fewstep.export.base import (
    ConvertsBundle,
    SupportsComputeDtype,
    SupportsT5Bits,
    Target,
    find_target,
    targets,
)
from fewstep.export.common.output_paths import write_errors
from fewstep.export.metadata import has_t5, read_metadata, source_metadata
from fewstep.runtime.bundle import LARGEST, Bundle, Compute

CONVERTED_BITS = 16
"""Default bits per weight of a converted bundle. Its weights are already rounded once."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        bits: bits per weight. ``None`` is the target's default, and 16 where the source is a bundle.
        t5: ``drop``, ``keep``, or bits per weight of T5. ``None`` is the target's default.
        compute: number type in which the graphs compute.
        lora: LoRAs to merge, each ``FILE`` or ``FILE:WEIGHT``.
        name: name of the exported model. ``None`` keeps the source's.
        steps: default number of sampling steps. ``None`` keeps the source's.
        license: name of the licence of the weights. ``None`` keeps the source's.
        metadata: a file with a JSON object of further metadata.
    """

    bits: int | None = None
    t5: str | None = None
    compute: Compute = "float32"
    lora: tuple[str, ...] = ()
    name: str | None = None
    steps: int | None = None
    license: str | None = None
    metadata: Path | None = None


def export_model(source: str, output: Path, to: str, options: ExportOptions) -> str:
    """Export a model and describe the result in one line.

    Args:
        source: a run folder, a diffusers folder, a hub name, a Stability ``.safetensors`` file or a bundle.
        output: the folder or file that the target writes. An earlier export there is replaced.
        to: name or import path of the target (:func:`fewstep.export.base.find_target`).
        options: how to export.

    Raises:
        UserError: the target does not support an option or this model, or ``output`` cannot be written.
    """
    from fewstep.pipeline.resolve import bundle_of

    if options.steps is not None and not 1 <= options.steps <= LARGEST:
        raise UserError(f"steps must be 1 to {LARGEST}, not {options.steps}")
    target = find_target(to)
    _check_bits(options.bits, to, target)
    _check_compute(options.compute, to, target)
    t5, t5_bits = _t5_options(options.t5, to, target)
    about = read_metadata(options.metadata)
    need(*target.needs(options.bits or max(target.BITS)))
    target.check(output)
    folder = _resolve(source)
    if isinstance(target, ConvertsBundle) and (bundle := bundle_of(source)) is not None:
        _check_bundle_options(source, options)
        return _convert(bundle, target, output, options, about)
    return _export_family(source, folder, target, to, output, options, about, t5, t5_bits)


def _resolve(source: str) -> Path:
    from fewstep.pipeline.resolve import parse_family, resolve

    return resolve(parse_family(source)[1])


def _check_bits(bits: int | None, to: str, target: Target) -> None:
    if bits not in (None, *target.BITS):
        supported = ", ".join(map(str, sorted(target.BITS)))
        raise UserError(f"bits for {to} must be one of {supported}, not {bits}")


def _check_compute(compute: Compute, to: str, target: Target) -> None:
    supported = target.COMPUTES if isinstance(target, SupportsComputeDtype) else ("float32",)
    if compute in supported:
        return
    others = [
        name
        for name, other in targets().items()
        if isinstance(other, SupportsComputeDtype) and compute in other.COMPUTES
    ]
    raise UserError(
        f"--compute for {to} must be {' or '.join(supported)}, not {compute}: "
        f"that takes --to {', '.join(others)}"
    )


def _t5_options(t5: str | None, to: str, target: Target) -> tuple[bool | None, dict[str, int]]:
    """Return whether to load T5 (``None``: if the model has it) and the target's options for it.

    Raises:
        UserError: the value is unknown, or this target does not support it.
    """
    supported = target.T5_BITS if isinstance(target, SupportsT5Bits) else ()
    if t5 is None:
        return (None if target.T5 else False), {}
    if t5 == "drop":
        return False, {}
    if t5 == "keep" and (supported or target.T5):
        return True, {}
    if t5.isdecimal() and int(t5) in supported:
        return True, {"t5_bits": int(t5)}
    values = ["drop", *(["keep"] if supported or target.T5 else []), *map(str, sorted(supported))]
    raise UserError(f"--t5 for {to} must be one of {', '.join(values)}, not {t5}")


def _check_bundle_options(source: str, options: ExportOptions) -> None:
    """Refuse the options that need a PyTorch model."""
    if options.t5 is not None:
        raise UserError(f"{source} is a bundle, whose T5 is as it is: leave --t5 out")
    if options.lora:
        raise UserError(f"{source} is a bundle, and --lora is for PyTorch models: leave it out")


def _convert(
    bundle: Bundle, target: ConvertsBundle, output: Path, options: ExportOptions, about: dict[str, object]
) -> str:
    if bundle.engine != "onnx":
        raise UserError(f"{bundle.folder} is a bundle for {bundle.engine}: give one for onnx")
    bits = options.bits or CONVERTED_BITS
    fields = bundle.to_dict()
    overrides = {
        "name": options.name,
        "steps": options.steps,
        "license": options.license,
        "compute": options.compute,
    }
    fields |= {key: value for key, value in overrides.items() if value is not None}
    fields["about"] = {**fields.get("about", {}), **about, "bits": bits}
    with Progress() as progress, write_errors(output):
        progress(f"writing {output}")
        line = target.convert(bundle, output, bits, fields)
    return f"{fields['name']}: {output}, {line}"


def _export_family(
    source: str,
    folder: Path,
    target: Target,
    to: str,
    output: Path,
    options: ExportOptions,
    about: dict[str, object],
    t5: bool | None,
    t5_bits: dict[str, int],
) -> str:
    from fewstep.families.lora.adapters import apply, named, specs
    from fewstep.pipeline.loading import kind_of, load_family

    bits = options.bits or target.BITS[0]
    need("torch", "diffusers", "transformers", *target.needs(bits))
    metadata = replace(source_metadata(folder, options.license, about), compute=options.compute)
    loras = specs(options.lora)
    metadata = replace(metadata, about={**metadata.about, **named(loras)})
    if (kind := kind_of(source)) not in target.FAMILIES:
        raise UserError(f"{source} is of the family {kind}, which cannot be written for {to}")
    if t5 and not has_t5(folder):
        raise UserError(f"{source} has no T5: leave --t5 out")
    with Progress() as progress:
        progress(f"loading {source}")
        family = load_family(source, t5=t5)
        apply(family.parts, family.architecture, loras)
        family = replace(family, steps=options.steps or family.steps, name=options.name or family.name)
        progress(f"writing {output} for {to}")
        with write_errors(output):
            line = target.export(family, output, bits, metadata, **t5_bits)
    return f"{family.name}: {output}, {line}"
