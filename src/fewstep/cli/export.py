"""The command ``fewstep export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.core.progress import emit
from fewstep.export.run import ExportOptions, export_model
from fewstep.runtime.bundle import Compute


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
    """Write a trained model for another engine or program.

    A LICENSE and a model card (README.md) in the source folder are copied. An earlier export at the same
    place is replaced.

    Args:
        source: A run folder, a diffusers folder, a hub name, or a Stability .safetensors file. For openvino
            also a bundle, such as pocket, which needs no PyTorch.
        output: The folder to write, or the file where the target is a file.
        to: The target: coreml, diffusers, executorch, genai, gguf, onnx, openvino, single-file, or the import
            path of a module. onnx is a bundle, which generates without PyTorch.
        bits: Bits per weight. [default: the target's own; 16 for a bundle]
        t5: drop, keep, or the bits per weight of T5 (bundles for onnx and openvino). [default: dropped from
            bundles]
        compute: Number type in which the graphs compute, for openvino. On processors with instructions for
            them, bfloat16 and int8 (8 or 4 bits) are faster.
        lora: A LoRA to merge into the weights, as FILE or FILE:WEIGHT; repeat the option for more.
        name: Name of the model. [default: the source's]
        steps: Default number of steps. [default: the source's]
        license: Name of the weights' licence, such as Apache-2.0.
        metadata: A JSON object of metadata to store; "styles" lists the style words that the model knows.
    """
    options = ExportOptions(bits, t5, compute, lora, name, steps, license, metadata)
    emit(export_model(source, output, to, options))
