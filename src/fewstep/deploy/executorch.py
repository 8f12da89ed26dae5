"""A torch family as a bundle of ExecuTorch programs, for phones: XNNPACK runs them (floor 3)."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

from fewstep.deploy import Facts
from fewstep.deploy.common.bundle import write_bundle
from fewstep.deploy.common.graphs import Part, parts
from fewstep.families import Family

FAMILIES = ("sd3",)
BITS = (32, 8, 4)
T5 = False

GROUP = 32
"""Weights of 4 bits that share a scale."""


def export(family: Family, out: Path, bits: int, facts: Facts) -> str:
    """Write ``family`` as a bundle for ExecuTorch (:func:`fewstep.deploy.common.bundle.write_bundle`).

    Args:
        family: an SD3-type family in float32 on the processor.
        out: the folder where the bundle goes.
        bits: of :data:`BITS`, a weight of a matrix: see :func:`quantized`.
        facts: what it tells of itself.

    Returns:
        What there is now, in a line.

    Raises:
        UserError: something else lies at ``out``.
        ImportError: ExecuTorch or torchao is not installed.
    """
    with _quiet():
        import executorch.exir  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]

    counts: list[tuple[int, int]] = []

    def write(folder: Path) -> None:
        for stem, part in parts(family).items():
            with _quiet():
                edge = lowered(part, bits)
                counts.append(delegated(edge))
                with (folder / f"{stem}.pte").open("wb") as file:
                    edge.to_executorch().write_to_file(file)

    line = write_bundle(family, out, bits, facts, "executorch", write)
    theirs, all_of_them = (sum(numbers) for numbers in zip(*counts, strict=True))
    return f"{line}, {theirs} of {all_of_them} operators on XNNPACK"


def lowered(part: Part, bits: int) -> Any:
    """``part`` for one picture as an ``EdgeProgramManager``, what XNNPACK can do given to it."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    module = part.module if bits == 32 else quantized(part.module, bits)
    inputs = {name: tensor[:1].clone() for name, tensor in part.inputs.items()}
    with torch.no_grad():
        program = torch.export.export(module, (), inputs)
        program = program.run_decompositions(
            {torch.ops.aten.scaled_dot_product_attention.default: _attention}
        )
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def quantized(module: Any, bits: int) -> Any:
    """A copy of ``module`` whose linear layers have weights of 8 or 4 bits.

    XNNPACK knows small weights only where activations have 8 bits as well: every token gets its own scale
    when it comes. Weights have a scale a row at 8 bits, one for each :data:`GROUP` at 4; where rows are no
    multiple of that, 8 bits. Embeddings and kernels stay float32.
    """
    import torch
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationIntxWeightConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    def parted(layer: Any, _: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and layer.in_features % GROUP == 0

    def linear(layer: Any, _: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and type(layer.weight) is torch.nn.Parameter

    small = copy.deepcopy(module)
    if bits == 4:
        int4: Any = torch.__dict__["int4"]  # which torch's own stubs do not tell
        few = Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(GROUP))
        quantize_(small, few, filter_fn=parted)
    many = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(small, many, filter_fn=linear)
    return small


def delegated(edge: Any) -> tuple[int, int]:
    """Operators of a lowered program that XNNPACK has, and all of them."""
    from executorch.exir.lowered_backend_module import (  # pyright: ignore[reportMissingImports]
        get_lowered_submodules,
    )

    def operators(graph: Any) -> int:
        return sum(hasattr(node.target, "_schema") for node in graph.nodes if node.op == "call_function")

    outer = edge.exported_program().graph_module
    modules: list[Any] = [module for _, module, _ in get_lowered_submodules(outer)]
    theirs = sum(operators(module.original_module.graph) for module in modules)
    return theirs, theirs + operators(outer.graph)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of everything to everything as XNNPACK has it: products and a softmax.

    torch's own decomposition guards against rows that are masked whole, in operators that XNNPACK lacks.
    """
    if mask is not None or causal or dropout or enable_gqa:
        return NotImplemented  # torch's own
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return ((query * scale) @ key.transpose(-2, -1)).softmax(-1) @ value


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence what ExecuTorch and torchao tell of torch's deprecations and of their own missing kernels."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
