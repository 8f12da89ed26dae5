"""Export as a bundle of ExecuTorch programs for phones, with XNNPACK as the backend."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Generator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.export.base import ExportMetadata
from fewstep.export.common.bundle import check_place, write_bundle
from fewstep.export.common.graphs import GraphSpec, parts
from fewstep.families.base import Family

if TYPE_CHECKING:
    from torch.fx import Graph

FAMILIES = ("sd3",)
BITS = (32, 8)
T5 = False
QUANTIZED = ("modulation", "transformer")
"""Graphs whose linear layers get 8 bits. Text encoders lose too much, and the VAE has few such layers."""


def needs(bits: int) -> tuple[str, ...]:
    """See :class:`fewstep.export.base.Target`."""
    return ("executorch",)


def check(out: Path) -> None:
    """See :class:`fewstep.export.base.Target`."""
    check_place(out)
    import_module("executorch")


def export(family: Family, out: Path, bits: int, metadata: ExportMetadata) -> str:
    """Write ``family`` as a bundle for ExecuTorch (:func:`fewstep.export.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the CPU.
        out: the folder of the bundle.
        bits: bits per weight, one of :data:`BITS`. At 8, the graphs of :data:`QUANTIZED` have int8 weights
            with a scale per row and int8 activations with a scale per token.
        metadata: metadata to store.

    Returns:
        One line that describes the export.

    Raises:
        UserError: something else exists at ``out``.
        ImportError: ExecuTorch is not installed.
    """
    with _quiet():
        import executorch.exir  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]

    counts: list[tuple[int, int]] = []

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            with _quiet():
                edge = lowered(quantized(part) if bits == 8 and stem in QUANTIZED else part)
                counts.append(count_delegated(edge))
                with (folder / f"{stem}.pte").open("wb") as file:
                    edge.to_executorch().write_to_file(file)

    line = write_bundle(family, out, bits, metadata, "executorch", write)
    delegated, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    return f"{line}, {delegated} of {total} operators on XNNPACK"


def quantized(part: GraphSpec) -> GraphSpec:
    """Return a copy of ``part`` whose linear layers multiply int8 weights and activations."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    module = copy.deepcopy(part.module)  # the weights are shared with the family
    quantize_(
        module, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    )
    return replace(part, module=module)


def lowered(part: GraphSpec) -> Any:
    """Lower ``part`` for a batch of one to an ``EdgeProgramManager`` that delegates to XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    inputs = {name: tensor[:1].clone() for name, tensor in part.inputs.items()}
    with torch.no_grad():
        program = torch.export.export(part.module, (), inputs)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def count_delegated(edge: Any) -> tuple[int, int]:
    """Return the number of operators that XNNPACK runs, and the number of all."""
    from executorch.exir.lowered_backend_module import (  # pyright: ignore[reportMissingImports]
        get_lowered_submodules,
    )

    def operators(graph: Graph) -> int:
        return sum(hasattr(node.target, "_schema") for node in graph.nodes if node.op == "call_function")

    outer = edge.exported_program().graph_module
    modules: list[Any] = [module for _, module, _ in get_lowered_submodules(outer)]
    delegated = sum(operators(module.original_module.graph) for module in modules)
    return delegated, delegated + operators(outer.graph)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence warnings of ExecuTorch and torchao about deprecations and missing kernels."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
