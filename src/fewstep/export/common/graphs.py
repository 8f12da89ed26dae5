"""A family's parts as graphs: what goes in, what comes out, and the ONNX of each."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import UserError
from fewstep.export.common.token_lengths import t5_length, text_length
from fewstep.families.base import Family

OPSET = 20
LARGEST = 2**31 - 2**20
"""Most bytes of a protobuf message; the weights of a graph above it lie in a file beside it."""


@dataclass(frozen=True)
class GraphSpec:
    """One graph to be: a module, an example of its inputs (batch 2, or a row that all share), and the names
    of both ends."""

    module: Any
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]


def check_finite(name: str, part: Any) -> None:
    """Refuse a net, called ``name``, that draws nothing: one with a weight that is no number."""
    for path, weight in part.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"{name}: the weight {path} has NaN or infinite numbers, so the model draws nothing"
            )


def parts(family: Family) -> dict[str, GraphSpec]:
    """The graphs of a model as torch modules, with examples of what goes in: five, or six with T5.

    Raises:
        UserError: a weight is no number.
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
    told = {"t": torch.tensor([1.0, 0.5])}
    with torch.no_grad():
        context, told["pooled"] = text(tokens)
        modulations = modulation(**told)
    texts = {"text": GraphSpec(text, {"tokens": tokens}, ("context", "pooled"))}
    if room := t5_length(family):
        t5, its_tokens = wrappers.T5Module(family).eval(), torch.zeros(2, room, dtype=torch.int64)
        its_tokens[:, 0] = 1
        texts["t5"] = GraphSpec(t5, {"tokens": its_tokens}, ("context",))
        with torch.no_grad():
            context = torch.cat([context, t5(its_tokens)], dim=1)
    latents = torch.zeros(2, channels, height, width)
    images = torch.zeros(2, 3, height * family.downscale, width * family.downscale)
    net = {"x": latents, "context": context, "modulation": modulations}
    return texts | {
        "modulation": GraphSpec(modulation, told, ("modulation",)),
        "transformer": GraphSpec(wrappers.TransformerModule(family).eval(), net, ("velocity",)),
        "decoder": GraphSpec(wrappers.DecoderModule(family).eval(), {"latents": latents}, ("images",)),
        "encoder": GraphSpec(wrappers.EncoderModule(family).eval(), {"images": images}, ("latents",)),
    }


def trace(part: GraphSpec) -> Any:
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
            dynamic_shapes={name: {0: batch} if len(x) > 1 else {} for name, x in part.inputs.items()},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    del model.graph.value_info[:]  # shapes of what lies between, which engines infer
    for node in model.graph.node:
        del node.metadata_props[:]  # torch's stack traces: paths of this machine, in a file that ships
    return model


def write_graph(model: Any, path: Path) -> None:
    """Write an ``onnx.ModelProto``; weights too many for one file go to ``NAME.onnx.data`` beside it."""
    import onnx

    large = model.ByteSize() > LARGEST
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's exporter about torchvision's absence and its own deprecations."""
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
