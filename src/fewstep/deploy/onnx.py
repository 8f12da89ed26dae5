"""A torch family as a bundle of ONNX graphs, which generates without torch (floor 3)."""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.deploy.quantize import BITS, shrink
from fewstep.families import Family
from fewstep.files import replacing_folder
from fewstep.runtime.bundle import MANIFEST, Bundle, read, seal
from fewstep.types import UserError

OPSET = 20
LARGEST = 2**31 - 2**20
"""Most bytes of a protobuf message; the weights of a graph above it lie in a file beside it."""


@dataclass(frozen=True)
class Part:
    """One graph to be: a module, an example of its inputs (batch 2), and the names of both ends."""

    module: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]


def export(
    family: Family,
    folder: str | Path,
    *,
    license: str,
    license_file: str | Path | None = None,
    bits: int = 8,
    about: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write ``family`` as a bundle (:mod:`fewstep.runtime.bundle`).

    T5 stays out: the graphs see the tokens of the two CLIPs only. The bundle is made beside its place and
    renamed, so an interrupted export leaves nothing there; an earlier bundle there is replaced.

    Args:
        family: an SD3-type family in float32 on the processor.
        folder: where the bundle goes.
        license: the licence of the weights, such as ``Apache-2.0``.
        license_file: its text, to ship as ``LICENSE``.
        bits: 32, 16 or 8 a weight (:mod:`fewstep.deploy.quantize`).
        about: free facts for ``bundle.json``.

    Raises:
        UserError: another number of bits, something else lies at ``folder``, or the disk refuses.
    """
    target = Path(folder)
    if bits not in BITS:
        raise UserError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits}")
    if target.exists() and not (target / MANIFEST).is_file():
        raise UserError(f"{target} exists and is no bundle: choose another place")
    channels, height, width = family.latent
    facts = {
        "name": family.name,
        "family": "sd3",
        "license": license,
        "latent": {"channels": channels, "height": height, "width": width, "downscale": family.downscale},
        "shift": family.shift,
        "steps": family.steps,
        "guidance": family.guidance,
        "sampler": family.sampler,
        "text": {"length": text_length(family)},
        "about": {"bits": bits, **(about or {})},
    }
    try:
        with replacing_folder(target) as fresh:
            for stem, part in parts(family).items():
                write_graph(shrink(trace(part), bits), fresh / f"{stem}.onnx")
            write_tokenizer(family, fresh / "tokenizer.json")
            if license_file is not None:
                shutil.copyfile(license_file, fresh / "LICENSE")
            seal(fresh, facts)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from error
    return read(target)


def text_length(family: Family) -> int:
    """Tokens of a prompt, ``L``, as the CLIPs of ``family`` take them."""
    positions = family.parts["text_encoder"].config.max_position_embeddings
    return min(family.parts["tokenizer"].model_max_length, positions)


def parts(family: Family) -> dict[str, Part]:
    """The four graphs of a bundle as torch modules, with examples of what goes in."""
    import torch

    from fewstep.deploy.modules import DecoderModule, EncoderModule, TextModule, TransformerModule

    channels, height, width = family.latent
    length = text_length(family)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[:, 1:] = family.parts["tokenizer"].eos_token_id
    text = TextModule(family).eval()
    with torch.no_grad():
        context, pooled = text(tokens)
    latents = torch.zeros(2, channels, height, width)
    images = torch.zeros(2, 3, height * family.downscale, width * family.downscale)
    net = {"x": latents, "t": torch.tensor([1.0, 0.5]), "context": context, "pooled": pooled}
    return {
        "text": Part(text, {"tokens": tokens}, ("context", "pooled")),
        "transformer": Part(TransformerModule(family).eval(), net, ("velocity",)),
        "decoder": Part(DecoderModule(family).eval(), {"latents": latents}, ("images",)),
        "encoder": Part(EncoderModule(family).eval(), {"images": images}, ("latents",)),
    }


def trace(part: Part) -> Any:
    """``part`` as an ``onnx.ModelProto`` with a free batch size."""
    import torch

    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            part.module,
            kwargs=dict(part.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes={name: {0: batch} for name in part.inputs},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # torch's stack traces: paths of this machine, in a file that ships
    return model


def write_graph(model: Any, path: Path) -> None:
    """Write an ``onnx.ModelProto``; weights too many for one file go to ``NAME.onnx.data`` beside it."""
    import onnx

    large = model.ByteSize() > LARGEST
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def write_tokenizer(family: Family, path: Path) -> None:
    """The first CLIP's tokenizer in the ``tokenizers`` library's format, cutting and padding to ``L``."""
    tokenizer = family.parts["tokenizer"]
    backend = type(tokenizer._tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    length = text_length(family)
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.save(str(path))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's exporter about torchvision's absence and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
            yield
    finally:
        log.setLevel(level)
