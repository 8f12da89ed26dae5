"""Export as a folder for OpenVINO GenAI, which implements the SD3 pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

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
    """Write ``family`` for ``openvino_genai.Text2ImagePipeline`` and ``Image2ImagePipeline``.

    Args:
        family: an SD3-type family in float32 on the CPU, without T5.
        out: the folder to write.
        bits: bits per weight, one of :data:`BITS`. 16 is float16; 8 and 4 are compressed by NNCF.
        metadata: metadata to store.

    Returns:
        One line that describes the export.

    Raises:
        UserError: something else exists at ``out``, a weight exceeds the range of float16, or GenAI does not
            support this model's sampler or schedule.
        ImportError: OpenVINO, its tokenizers or NNCF is not installed.
    """
    check(out)
    _check_family(family)
    largest = timesteps(family.steps, family.shift)
    from fewstep.export.common import openvino_ir
    from fewstep.export.common.diffusers_graphs import diffusers_parts

    if bits == 16:
        openvino_ir.check_float16(family.parts, "--bits 8")
    with replacing_folder(out) as fresh:
        for name in ("tokenizer", "tokenizer_2"):
            (fresh / name).mkdir()
            openvino_ir.write_tokenizer(family.parts[name], text_length(family), fresh / name)
        for name, part in diffusers_parts(family, largest).items():
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
    """Return whether a folder is an earlier export for GenAI."""
    try:
        return json_io.read(folder / MANIFEST).get("format") == FORMAT
    except UserError:
        return False


def timesteps(steps: int, shift: float) -> int:
    """Return the number of training timesteps at which GenAI's schedule equals fewstep's.

    GenAI's scheduler uses :func:`fewstep.core.schedule.diffusers_grid`: evenly spaced times from 1 to the
    smallest training time, shifted. With ``shift (steps - 1) + 1`` training timesteps the smallest is
    ``1 / steps``, and the schedule is :func:`fewstep.core.schedule.grid`. With a thousand, the last of few
    steps would start almost at zero.

    Raises:
        UserError: that number is not whole.
    """
    exact = shift * (steps - 1) + 1
    if abs(exact - round(exact)) > 1e-6:
        raise UserError(
            f"GenAI cannot take {steps} steps at shift {shift:g}: the shift times (steps - 1) must be whole"
        )
    return round(exact)


def _check_family(family: Family) -> None:
    """Check that GenAI's pipeline supports the family.

    Raises:
        UserError: the sampler or the autoencoder is not supported.
    """
    from diffusers import AutoencoderKL

    if family.sampler != "euler":
        raise UserError(f"GenAI has no sampler {family.sampler}")
    if not isinstance(family.parts["vae"], AutoencoderKL):
        raise UserError("GenAI wants an AutoencoderKL, the model has another autoencoder")


def _config(family: Family, name: str) -> dict[str, object]:
    """Return the fields of a part's configuration that GenAI reads, under their diffusers names."""
    keys: dict[str, tuple[str, ...]] = {
        "text_encoder": ("num_hidden_layers",),
        "transformer": ("patch_size", "in_channels", "joint_attention_dim"),
        "vae": (
            "in_channels", "latent_channels", "out_channels", "shift_factor", "scaling_factor",
            "block_out_channels",
        ),
    }  # fmt: skip
    part = name.removesuffix("_decoder").removesuffix("_encoder") if name.startswith("vae") else name
    config = family.parts[part].config
    fields = {key: getattr(config, key) for key in keys[part.removesuffix("_2")]}
    if part == "transformer":
        fields["sample_size"] = family.latent[1]
    elif part != "vae":
        fields["max_position_embeddings"] = text_length(family)
    return fields


def _write_json(fields: Mapping[str, object], path: Path) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
