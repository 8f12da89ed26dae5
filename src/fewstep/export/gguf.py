"""Export of the net as GGUF, for stable-diffusion.cpp and ComfyUI-GGUF."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.export.base import ExportMetadata
from fewstep.export.common.output_paths import check_file, fresh_file
from fewstep.export.common.sd3_keys import file_metadata, net_tensors
from fewstep.families.base import Family

if TYPE_CHECKING:
    import numpy as np

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
T5 = False

KINDS = {4: "Q4_0", 8: "Q8_0", 16: "F16"}
"""GGUF type names of :data:`BITS`. The first two share a scale among 32 weights of a row."""

BLOCK = 32
SMALLEST = 1024
LARGEST = 65504.0
OUTER = ("pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "final_layer.")
"""Layers outside the blocks, which stay float16: 1 % of SD3.5 Medium's weights and its position table."""


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("gguf",)


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]

    check_file(out, ".gguf", _is_export)


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write the net of ``family`` as a ``.gguf`` file, without text encoders and autoencoder.

    Tensors have Stability's names without the prefix ``model.diffusion_model.``, as in other files of a net
    alone. With the prefix the longest name has 77 letters, and GGML allows 63. Readers add it if they need
    it.

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the file, with the suffix ``.gguf``.
        bits: bits per weight of the blocks' matrices; see :func:`kind_of` for other tensors.
        metadata: metadata to store.

    Returns:
        One line that describes the export.

    Raises:
        UserError: something else exists at ``out``, or the net has a tensor that SD3 does not have.
    """
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize

    with fresh_file(out, ".gguf", _is_export) as fresh:
        header = file_metadata(family, metadata, bits)
        writer = GGUFWriter(fresh, "sd3")
        writer.add_name(header["title"])
        writer.add_license(header["license"])
        writer.add_description(header["usage_hint"])
        writer.add_string("fewstep", header["fewstep"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{KINDS[bits]}"])
        for name, tensor in net_tensors(family.parts).items():
            array = tensor.detach().numpy()
            kind = GGMLQuantizationType[kind_of(name, array, bits)]
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return f"{out.stat().st_size / 1e6:.1f} MB, the net alone, its blocks in {KINDS[bits]}"


def kind_of(name: str, array: np.ndarray, bits: int) -> str:
    """Return the GGUF type of a tensor.

    Vectors are float32, which readers expect. Matrices of the blocks get ``bits`` if 32 divides their row
    length. Other tensors are float16, or float32 if a value exceeds its range.
    """
    if array.ndim == 1 or abs(array).max() > LARGEST:
        return "F32"
    small = array.ndim != 2 or array.shape[-1] % BLOCK or prod(array.shape) < SMALLEST
    return "F16" if small or name.startswith(OUTER) else KINDS[bits]


def _is_export(path: Path) -> bool:
    from gguf import GGUFReader

    try:
        return "fewstep" in GGUFReader(path).fields
    except (ValueError, IndexError):  # another format, or a truncated file
        return False
