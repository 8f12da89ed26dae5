"""Export as Core ML packages for Apple devices."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

from fewstep.core import json_io
from fewstep.core.atomic import replacing_folder
from fewstep.core.optional import install
from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.export.common.graphs import GraphSpec, parts
from fewstep.export.common.manifest import manifest, write_tokenizer
from fewstep.families.base import Family

FAMILIES = ("sd3",)
BITS = (6, 4, 8, 16)
T5 = False

MANIFEST = "model.json"
FORMAT = "fewstep-coreml-1"

PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
"""File of a package that coremltools writes without read permission for others."""

GROUP = 64
"""Output channels that share a palette.

Palettes per group need iOS 18, as does the attention operator; palettes per tensor need iOS 16. Groups of 16
reduce the error of a 6-bit weight by 3 % and double the export time."""

SMALLEST = 2048
"""Smallest number of elements of a compressed tensor. Smaller tensors stay float16."""

WEIGHTS = ("linear", "conv", "gather")
"""Operators whose weights are compressed. Other weights (biases, norms, position embeddings) stay float16."""

WRITER = "[MIL FileWriter]"
"""Start of the error messages of the code that writes weights."""

FLOAT32_OPS = ("mul", "expand_dims", "sin", "cos")
"""Operators of the modulation graph that compute in float32: sines of a time of up to 1000, where float16 has
steps of a half. All other graphs compute in float16."""

SLICED = "common::scaled_dot_product_attention_sliced_q"
"""coremltools' pass for attention over 1280 tokens and more. It slices the queries, so that the whole
attention matrix is never in memory."""


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("coremltools", "sklearn")


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    if out.exists() and not _is_export(out):
        raise UserError(f"{out} exists and is no Core ML export of fewstep: choose another place")
    _check_tools()


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write ``family`` as a folder of ``.mlpackage``: text, modulation, transformer, decoder and encoder.

    Inputs and outputs have the names of a bundle's graphs (:mod:`fewstep.runtime.bundle`) and a batch of one.
    ``tokens`` are int32, all others float32. The folder also contains ``tokenizer.json`` and ``model.json``.

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the folder to write.
        bits: bits per weight, one of :data:`BITS`. 16 is float16, 8 is int8 with a scale per output channel,
            6 and 4 are palettes (:func:`quantize`).
        metadata: metadata to store.

    Returns:
        One line that describes the export.

    Raises:
        UserError: something else exists at ``out``, or coremltools does not work with this numpy.
    """
    check(out)
    with _writing(out), replacing_folder(out) as fresh:
        shapes: dict[str, dict[str, object]] = {}
        for stem, part in parts(family).items():
            package = fresh / f"{stem}.mlpackage"
            quantize(converted(part), bits).save(str(package))
            shutil.copymode(package / "Manifest.json", package / PROGRAM)
            shapes[stem] = {"inputs": {name: [1, *x.shape[1:]] for name, x in part.inputs.items()}}
            shapes[stem]["outputs"] = list(part.outputs)
        fields = {"format": FORMAT, **manifest(family, metadata, bits), "parts": shapes}
        (fresh / MANIFEST).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
        write_tokenizer(family, fresh / "tokenizer.json")
        if metadata.license_file is not None:
            shutil.copyfile(metadata.license_file, fresh / "LICENSE")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB, {bits}-bit weights, for iOS 18 and macOS 15"


def converted(part: GraphSpec) -> Any:
    """Convert ``part`` to a ``coremltools`` model of float16 for a batch of one."""
    import numpy as np
    import torch

    from fewstep.export.common.fp16_norms import with_fp16_norms

    ct = importlib.import_module("coremltools")
    inputs = {name: example[:1] for name, example in part.inputs.items()}
    dtypes: dict[torch.dtype, type[np.generic]] = {torch.int64: np.int32, torch.float32: np.float32}
    passes = ct.PassPipeline.DEFAULT
    passes.append_pass(SLICED)
    modulation = "modulation" in part.outputs
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(with_fp16_norms(part.module), tuple(inputs.values()), check_trace=False)
        return ct.convert(
            traced,
            inputs=[ct.TensorType(name, x.shape, dtypes[x.dtype]) for name, x in inputs.items()],
            outputs=[ct.TensorType(name, dtype=np.float32) for name in part.outputs],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.transform.FP16ComputePrecision(_is_half if modulation else None),
            pass_pipeline=passes,
            skip_model_load=True,
        )


def _is_half(op: Any) -> bool:
    return op.op_type not in FLOAT32_OPS


def quantize(model: Any, bits: int) -> Any:
    """Compress the matrices, convolution kernels and embeddings of ``model`` to ``bits``.

    A palette is found by k-means over the weights of :data:`GROUP` output channels, or of the whole tensor if
    the group size does not divide it.
    """
    if bits == 16:
        return model
    cto = importlib.import_module("coremltools.optimize.coreml")
    palettes: dict[str, object] = {"mode": "kmeans", "nbits": bits, "weight_threshold": SMALLEST}
    grouped: dict[str, object] = {"granularity": "per_grouped_channel", "group_size": GROUP}
    options: dict[str, object] = {}
    with _quiet():
        for name, weight in cto.get_weights_metadata(model, SMALLEST).items():
            if any(child.op_type not in WEIGHTS for child in weight.child_ops):
                continue
            if bits == 8:
                options[name] = cto.OpLinearQuantizerConfig(
                    mode="linear_symmetric", dtype="int8", weight_threshold=SMALLEST
                )
            else:
                groups: dict[str, object] = (
                    grouped if weight.val.shape[0] % GROUP == 0 else {"granularity": "per_tensor"}
                )
                options[name] = cto.OpPalettizerConfig(**palettes, **groups)
        config = cto.OptimizationConfig(op_name_configs=options)
        compress = cto.linear_quantize_weights if bits == 8 else cto.palettize_weights
        return compress(model, config)


@contextlib.contextmanager
def _writing(out: Path) -> Generator[None]:
    """Turn write errors of coremltools' C++ code into one line. It writes to the temporary folder first."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(WRITER):
            raise
        raise UserError(f"cannot write {out}, or the folder of temporary files: {error}") from error


def _is_export(folder: Path) -> bool:
    try:
        return json_io.read(folder / MANIFEST).get("format") == FORMAT
    except UserError:
        return False


def _check_tools() -> None:
    """Import coremltools without its warnings about newer torch versions and other systems than macOS.

    Raises:
        UserError: coremltools does not work with this numpy.
        ImportError: it is not installed.
    """
    import numpy as np

    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with _quiet():
        version: str = importlib.import_module("coremltools").__version__
        importlib.import_module("sklearn")  # the k-means of the palettes; coremltools imports it lazily
    if version.startswith("9.0") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        raise UserError(f"coremltools 9.0 does not work with numpy {np.__version__}: {install('coreml')}")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence progress bars and tracer warnings about fixed shapes, which are intended."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
