"""A torch family as a folder for OpenVINO GenAI, which brings SD3's pipeline itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fewstep.core import json_io
from fewstep.core.atomic import replacing_folder
from fewstep.core.types import UserError
from fewstep.export.base import ExportMetadata
from fewstep.export.common.manifest import manifest
from fewstep.export.common.token_lengths import text_length
from fewstep.families.base import Family

FAMILIES = ("sd3",)
BITS = (8, 4, 16)
T5 = False

MANIFEST = "fewstep.json"
FORMAT = "fewstep-genai-1"

PIPELINE = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("openvino", "openvino_tokenizers", *(("nncf",) if bits < 16 else ()))


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    if out.exists() and not is_ours(out):
        raise UserError(f"{out} exists and is no export of fewstep for GenAI: choose another place")
    import_module("fewstep.runtime.openvino")
    import_module("openvino_tokenizers")


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write ``family`` where ``openvino_genai.Text2ImagePipeline`` and ``Image2ImagePipeline`` find it.

    Args:
        family: an SD3-type family in float32 on the processor, without T5.
        out: the folder.
        bits: of :data:`BITS`, a weight: 16 is float16 throughout, 8 and 4 are NNCF's.
        metadata: what it tells of itself.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``, float16 has no room for a weight, or GenAI cannot walk as
            this model does.
        ImportError: OpenVINO, its tokenizers or NNCF is not installed.
    """
    check(out)
    _check_family(family)
    largest = timesteps(family.steps, family.shift)
    from fewstep.export.common import openvino_ir
    from fewstep.export.common.diffusers_graphs import stock_parts

    if bits == 16:
        openvino_ir.check_float16(family.parts, "--bits 8")
    with replacing_folder(out) as fresh:
        for name in ("tokenizer", "tokenizer_2"):
            (fresh / name).mkdir()
            openvino_ir.write_tokenizer(family.parts[name], text_length(family), fresh / name)
        for name, part in stock_parts(family, largest).items():
            (fresh / name).mkdir()
            with openvino_ir.converted(part, fresh.parent) as graph:
                openvino_ir.write(graph, fresh / name / "openvino_model.xml", bits)
            _write_json(_config(family, name), fresh / name / "config.json")
        (fresh / "scheduler").mkdir()
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": largest,
            "shift": family.shift,
            "use_dynamic_shifting": False,
        }
        _write_json(scheduler, fresh / "scheduler" / "scheduler_config.json")
        _write_json(PIPELINE, fresh / "model_index.json")
        _write_json({"format": FORMAT, **manifest(family, metadata, bits)}, fresh / MANIFEST)
        if metadata.license_file is not None:
            shutil.copyfile(metadata.license_file, fresh / "LICENSE")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB, {bits}-bit weights, for {family.steps} steps"


def is_ours(folder: Path) -> bool:
    """Whether an earlier export lies there."""
    try:
        return json_io.read(folder / MANIFEST).get("format") == FORMAT
    except UserError:
        return False


def timesteps(steps: int, shift: float) -> int:
    """Training timesteps of a scheduler whose ``steps`` are ours.

    GenAI's scheduler walks :func:`fewstep.core.schedule.diffusers_grid`, even times from 1 to the smallest
    that it
    was trained on, shifted. The smallest is itself shifted; of ``shift (steps - 1) + 1`` training times it is
    ``1 / steps``, and the walk is :func:`fewstep.core.schedule.grid`. Of a thousand it would be so small
    that the last of few steps had nothing left to do.

    Raises:
        UserError: that is no whole number.
    """
    exact = shift * (steps - 1) + 1
    if abs(exact - round(exact)) > 1e-6:
        raise UserError(
            f"GenAI cannot walk {steps} steps at shift {shift:g}: the shift times (steps - 1) must be whole"
        )
    return round(exact)


def _check_family(family: Family) -> None:
    """What GenAI's pipeline cannot do."""
    from diffusers import AutoencoderKL

    if family.sampler != "euler":
        raise UserError(f"GenAI has no sampler {family.sampler}")
    if not isinstance(family.parts["vae"], AutoencoderKL):
        raise UserError("GenAI wants an AutoencoderKL, the model has another autoencoder")


def _config(family: Family, name: str) -> dict[str, Any]:
    """What GenAI reads of a part's configuration, as diffusers and transformers call it."""
    known: dict[str, tuple[str, ...]] = {
        "text_encoder": ("num_hidden_layers",),
        "transformer": ("patch_size", "in_channels", "joint_attention_dim"),
        "vae": (
            "in_channels", "latent_channels", "out_channels", "shift_factor", "scaling_factor",
            "block_out_channels",
        ),
    }  # fmt: skip
    part = name.removesuffix("_decoder").removesuffix("_encoder") if name.startswith("vae") else name
    config: Any = family.parts[part].config
    told = {key: getattr(config, key) for key in known[part.removesuffix("_2")]}
    if part == "transformer":
        told["sample_size"] = family.latent[1]
    elif part != "vae":
        told["max_position_embeddings"] = text_length(family)
    return told


def _write_json(told: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
