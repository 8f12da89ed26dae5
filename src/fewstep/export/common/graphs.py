"""The graphs of a family, with inputs and outputs, and their export to ONNX."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewstep.core.types import UserError
from fewstep.export.common.token_lengths import t5_length, text_length
from fewstep.families.base import Family

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20
LARGEST = 2**31 - 2**20
"""Largest size of a protobuf message, in bytes. A larger graph has its weights in a second file."""


@dataclass(frozen=True)
class GraphSpec:
    """A graph to export.

    Attributes:
        module: the torch module.
        inputs: example inputs by name, of batch 2, or of batch 1 where the whole batch shares the input.
        outputs: names of the outputs.
    """

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]


def check_finite(name: str, part: torch.nn.Module) -> None:
    """Check that all weights of a net are finite.

    Raises:
        UserError: one is not. The line starts with ``name``.
    """
    for path, weight in part.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"{name}: the weight {path} has NaN or infinite numbers, so the model draws nothing"
            )


def parts(family: Family) -> dict[str, GraphSpec]:
    """Return the five graphs of a model, or six with T5, as torch modules with example inputs.

    Raises:
        UserError: a weight is not finite.
    """
    import torch

    from fewstep.export.common import wrappers

    for name, part in family.parts.items():
        if isinstance(part, torch.nn.Module):
            check_finite(name, part)
    channels, height, width = family.latent
    length = text_length(family)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[:, 1:] = family.parts["tokenizer"].eos_token_id
    text, modulation = wrappers.TextModule(family).eval(), wrappers.ModulationModule(family).eval()
    modulation_inputs = {"t": torch.tensor([1.0, 0.5])}
    with torch.no_grad():
        context, modulation_inputs["pooled"] = text(tokens)
        modulations = modulation(**modulation_inputs)
    texts = {"text": GraphSpec(text, {"tokens": tokens}, ("context", "pooled"))}
    if length_t5 := t5_length(family):
        t5 = wrappers.T5Module(family).eval()
        t5_tokens = torch.zeros(2, length_t5, dtype=torch.int64)
        t5_tokens[:, 0] = 1
        texts["t5"] = GraphSpec(t5, {"tokens": t5_tokens}, ("context",))
        with torch.no_grad():
            context = torch.cat([context, t5(t5_tokens)], dim=1)
    latents = torch.zeros(2, channels, height, width)
    images = torch.zeros(2, 3, height * family.downscale, width * family.downscale)
    net_inputs = {"x": latents, "context": context, "modulation": modulations}
    return texts | {
        "modulation": GraphSpec(modulation, modulation_inputs, ("modulation",)),
        "transformer": GraphSpec(wrappers.TransformerModule(family).eval(), net_inputs, ("velocity",)),
        "decoder": GraphSpec(wrappers.DecoderModule(family).eval(), {"latents": latents}, ("images",)),
        "encoder": GraphSpec(wrappers.EncoderModule(family).eval(), {"images": images}, ("latents",)),
    }


def trace(part: GraphSpec) -> onnx.ModelProto:
    """Export ``part`` as an ``onnx.ModelProto`` with a dynamic batch size."""
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
            dynamic_shapes={name: {0: batch} if len(x) > 1 else {} for name, x in part.inputs.items()},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]  # shapes of intermediate tensors, which engines infer
    for node in model.graph.node:
        del node.metadata_props[:]  # torch stores stack traces with paths of this machine
    return model


def write_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write an ``onnx.ModelProto``. A model above :data:`LARGEST` has its weights in ``NAME.onnx.data``."""
    import onnx

    large = model.ByteSize() > LARGEST
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence warnings of torch's exporter about missing torchvision and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # constants are folded with numpy
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
            yield
    finally:
        log.setLevel(level)
