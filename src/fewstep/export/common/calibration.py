"""The inputs of a graph's layers while real pictures are drawn.

What an error in a weight costs depends on its input, and of inputs that come together the error of one can
make up for that of another. :func:`fewstep.export.common.onnx_quantize.to_groups` rounds by that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

DAMPING = (0.1, 0.01)
"""Shares of an input's own mean square, and of the mean of all of its layer, that are added to it: prompts
that come later bring inputs that calibration had not. A share of the mean alone would drown them where one is
a hundred times as large as the others. Pocket in 4 bits loses 0.5 dB with 0.3 for the first; 0.003 to 0.03
for the second cannot be told apart."""

PLACES = 32
"""Of a larger plane of outputs a convolution's inputs are taken at about so many places a side."""

TOKENS = 512
"""Of a longer row of tokens a linear layer's inputs are taken at about so many."""


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """What met a layer's weight.

    Attributes:
        weight: float32, its first axis the outputs; the layer's own memory.
        gram: sums of products of its inputs, float32 ``[I, I]``; ``I`` are all axes but the first.
    """

    weight: np.ndarray
    gram: np.ndarray

    def transposed(self, array: np.ndarray) -> bool:
        """Whether ``array``, the same weight in an exported graph, has its inputs first."""
        return not np.array_equal(array.squeeze(), self.weight.squeeze())

    def output_error(self, back: np.ndarray) -> float:
        """Squared error of the outputs, summed over all inputs, if ``back`` stood for the weight."""
        off = (back - self.weight).reshape(len(back), -1)
        return float(((off @ self.gram) * off).sum())

    def factor(self) -> np.ndarray:
        """Upper triangular, float32 ``[I, I]``: the Cholesky factor of the inverse of the damped ``gram``.

        It takes half a minute at 6,144 inputs; the one asked for last is kept.
        """
        return _factor(self)


@lru_cache(maxsize=1)  # asked for at every width of one weight after the other; of SD3.5 they are gigabytes
def _factor(inputs: CalibrationStats) -> np.ndarray:
    whole = inputs.gram.astype(np.float64)
    own, mean = DAMPING
    whole[np.diag_indices_from(whole)] += own * whole.diagonal() + mean * whole.diagonal().mean()
    return np.linalg.cholesky(np.linalg.inv(whole)).T.astype(np.float32)


@contextmanager
def collect_stats(
    modules: Mapping[str, Any],
) -> Generator[Callable[[], dict[tuple[str, str], CalibrationStats]]]:
    """Sum up what comes to every linear layer and convolution of several graphs while they run.

    Args:
        modules: torch modules by the name of their graph.

    Yields:
        What tells, when it is called, the inputs so far: by graph and name of the weight in it. A layer that
        nothing but zeros came to is left out.
    """
    import torch
    from torch import nn

    sums: dict[tuple[str, str], Any] = {}
    layers: dict[tuple[str, str], Any] = {}

    def hook(key: tuple[str, str]) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(layer: Any, given: tuple[Any, ...]) -> None:
            with torch.no_grad():
                rows = _rows(layer, given[0].detach().float())
                sums[key] = rows.T @ rows + sums.get(key, 0)

        return add

    for graph, module in modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                layers[graph, f"{name}.weight".lstrip(".")] = layer
    hooks = [layer.register_forward_pre_hook(hook(key)) for key, layer in layers.items()]
    try:
        yield lambda: {
            key: CalibrationStats(layers[key].weight.detach().numpy(), gram.numpy())
            for key, gram in sums.items()
            if gram.any()
        }
    finally:
        for each in hooks:
            each.remove()


def _rows(layer: Any, x: Any) -> Any:
    """What meets the weight, ``[N, I]``: some tokens; of a convolution the patches at some places.

    Those lie an odd number apart: of what lies in pairs, as an upsampling lays it down, both are taken.
    """
    from torch import nn

    if isinstance(layer, nn.Linear):
        if x.ndim > 2:
            x = x[..., :: _apart(x.shape[-2], TOKENS), :]
        return x.reshape(-1, x.shape[-1])
    sides = zip(layer.stride, x.shape[2:], strict=True)
    down, right = (stride * _apart(side // stride, PLACES) for stride, side in sides)
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, (down, right))
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _apart(there: int, wanted: int) -> int:
    return max(there // wanted, 1) | 1
