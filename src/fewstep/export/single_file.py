"""Export as a single file with Stability's key names, for ComfyUI and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.export.common.output_paths import check_file, fresh_file
from fewstep.export.common.sd3_keys import checkpoint, file_metadata
from fewstep.families.base import Family
from fewstep.families.diffusers_io import first_line

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("sd3",)
BITS = (16, 32)
T5 = True


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ()


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    check_file(out, ".safetensors", _is_export)


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write ``family`` as a ``.safetensors`` file with the net, the autoencoder and the text encoders.

    The header contains name, licence, steps, guidance, shift and sampler
    (:func:`fewstep.export.common.sd3_keys.file_metadata`), which :mod:`fewstep.families.single_file` reads.

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the file, with the suffix ``.safetensors``.
        bits: bits per weight, one of :data:`BITS`; 16 is float16.
        metadata: metadata to store.

    Returns:
        One line that describes the export.

    Raises:
        UserError: something else exists at ``out``, it cannot be written, the format has no place for a part
            of the family, or a weight exceeds the range of float16.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with fresh_file(out, ".safetensors", _is_export) as fresh:
        tensors = {name: _stored(name, tensor, bits) for name, tensor in checkpoint(family.parts).items()}
        text = file_metadata(family, metadata, bits)
        header = {"format": "pt", "fewstep": text.pop("fewstep")}
        header |= {f"modelspec.{key}": value for key, value in text.items()}
        try:
            save_file(tensors, fresh, header)
        except SafetensorError as error:
            raise UserError(f"cannot write {out}: {first_line(error)}") from error
    return f"{out.stat().st_size / 1e6:.1f} MB, {bits}-bit weights"


def _stored(name: str, tensor: Tensor, bits: int) -> Tensor:
    if bits == 16:
        tensor = tensor.half()
        if not tensor.isfinite().all():
            raise UserError(f"{name} has weights too large for float16: give --bits 32")
    return tensor.contiguous()


def _is_export(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "fewstep" in (file.metadata() or {})
    except SafetensorError:
        return False
