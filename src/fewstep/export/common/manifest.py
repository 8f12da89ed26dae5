"""The metadata and the tokenizers that are stored beside exported graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.export.base import ExportMetadata
from fewstep.export.common.token_lengths import t5_length, text_length
from fewstep.families.base import Family


def manifest(family: Family, metadata: ExportMetadata, bits: int) -> dict[str, object]:
    """Return the metadata that using the graphs requires: shapes, schedule, guidance, sampler and licence."""
    channels, height, width = family.latent
    return {
        "name": family.name,
        "family": family.kind,
        "license": metadata.license,
        "latent": {"channels": channels, "height": height, "width": width, "downscale": family.downscale},
        "shift": family.shift,
        "steps": family.steps,
        "guidance": family.guidance,
        "sampler": family.sampler,
        "text": {"length": text_length(family), "t5": t5_length(family)},
        **({} if metadata.compute == "float32" else {"compute": metadata.compute}),
        "about": {"bits": bits, **metadata.about},
    }


def write_tokenizer(family: Family, path: Path) -> None:
    """Write the first CLIP's tokenizer in the ``tokenizers`` format, truncating and padding to ``L``."""
    _write(family.parts["tokenizer"], text_length(family), path)


def write_t5_tokenizer(family: Family, path: Path) -> None:
    """Write T5's tokenizer in the same format, truncating and padding to T5's length."""
    _write(family.parts["tokenizer_3"], t5_length(family), path)


def _write(tokenizer: Any, length: int, path: Path) -> None:
    backend = type(tokenizer._tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.save(str(path), pretty=False)
