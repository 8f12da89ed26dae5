"""A torch family's net as GGUF, as stable-diffusion.cpp and ComfyUI-GGUF read it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from fewstep.export.base import ExportMetadata
from fewstep.export.common.output_paths import check_file, fresh_file
from fewstep.export.common.sd3_keys import file_metadata, net_tensors
from fewstep.families.base import Family

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
T5 = False

KINDS = {4: "Q4_0", 8: "Q8_0", 16: "F16"}
"""The format's names of :data:`BITS`; the first two share a scale among 32 weights of a row."""

BLOCK = 32
SMALLEST = 1024
LARGEST = 65504.0
OUTER = ("pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "final_layer.")
"""What all tokens share, left at float16: 1 % of SD3.5 Medium's weights, and its table of positions."""


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("gguf",)


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]

    check_file(out, ".gguf", _ours)


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write the net of ``family`` as a ``.gguf`` file, without text encoders and autoencoder.

    Tensors bear Stability's names without ``model.diffusion_model.``, as nets alone are shipped: with it the
    longest has 77 letters, and GGML by itself allows 63. Readers that want it put it in front.

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the file, ending in ``.gguf``.
        bits: a weight of the blocks' matrices; :func:`kind_of` has the rest.
        metadata: what it tells of itself.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, or the net has a tensor that is not SD3's.
    """
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize

    with fresh_file(out, ".gguf", _ours) as fresh:
        said = file_metadata(family, metadata, bits)
        writer = GGUFWriter(fresh, "sd3")
        writer.add_name(said["title"])
        writer.add_license(said["license"])
        writer.add_description(said["usage_hint"])
        writer.add_string("fewstep", said["fewstep"])
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


def kind_of(name: str, array: Any, bits: int) -> str:
    """How a tensor is stored, as the format calls it.

    Vectors stay float32, since readers add them as such. Matrices of the blocks get ``bits`` if their rows
    can be cut into blocks of 32. All else is float16, or float32 where that cannot hold it.
    """
    if array.ndim == 1 or abs(array).max() > LARGEST:
        return "F32"
    small = array.ndim != 2 or array.shape[-1] % BLOCK or prod(array.shape) < SMALLEST
    return "F16" if small or name.startswith(OUTER) else KINDS[bits]


def _ours(path: Path) -> bool:
    from gguf import GGUFReader

    try:
        return "fewstep" in GGUFReader(path).fields
    except (ValueError, IndexError):  # another format, or too short for any
        return False
