"""Calibration statistics: the inputs of a graph's layers during generation.

The cost of an error in a weight depends on the layer's inputs. Where inputs correlate, the error of one
weight can compensate that of another, which :func:`fewstep.export.common.gptq.to_groups` uses.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

DAMPING = (0.1, 0.01)
"""Damping of the Gram matrix: fractions of an input's own mean square, and of the mean over its layer.

Damping covers inputs that calibration did not produce. A fraction of the mean alone would dominate where one
input is a hundred times as large as the others. Pocket in 4 bits loses 0.5 dB with 0.3 for the first. Values
of 0.003 to 0.03 for the second give the same result."""

POSITIONS = 32
"""Output positions per side at which the inputs of a convolution are sampled, about."""

TOKENS = 512
"""Tokens per row at which the inputs of a linear layer are sampled, about."""


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """A layer's weight and the Gram matrix of its inputs.

    Attributes:
        weight: float32 ``[O, ...]``, a view of the layer's memory.
        gram: sums of products of the inputs, float32 ``[I, I]``. ``I`` is the product of all axes but the
        first.
    """

    weight: np.ndarray
    gram: np.ndarray

    def transposed(self, array: np.ndarray) -> bool:
        """Return whether ``array``, the weight in an exported graph, has its inputs on the first axis."""
        return not np.array_equal(array.squeeze(), self.weight.squeeze())

    def output_error(self, back: np.ndarray) -> float:
        """Return the squared error of the outputs, summed over all inputs, with ``back`` as the weight."""
        off = (back - self.weight).reshape(len(back), -1)
        return float(((off @ self.gram) * off).sum())

    def factor(self) -> np.ndarray:
        """Return the Cholesky factor of the inverse of the damped ``gram``.

        It is upper triangular, float32 ``[I, I]``. It takes half a minute for 6,144 inputs. The last result
        is cached.
        """
        return _factor(self)


@lru_cache(maxsize=1)  # every bit width of one weight uses it; those of SD3.5 take gigabytes
def _factor(inputs: CalibrationStats) -> np.ndarray:
    damped = inputs.gram.astype(np.float64)
    own, mean = DAMPING
    damped[np.diag_indices_from(damped)] += own * damped.diagonal() + mean * damped.diagonal().mean()
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


@contextmanager
def collect_stats(
    modules: Mapping[str, nn.Module],
) -> Generator[Callable[[], dict[tuple[str, str], CalibrationStats]]]:
    """Collect the inputs of every linear layer and convolution of several graphs while they run.

    Args:
        modules: torch modules by the name of their graph.

    Yields:
        A function that returns the statistics so far, by graph and name of the weight. Layers whose inputs
        were all zero are left out.
    """
    import torch
    from torch import nn

    sums: dict[tuple[str, str], Tensor] = {}
    layers: dict[tuple[str, str], nn.Linear | nn.Conv2d] = {}

    def hook(key: tuple[str, str]) -> Callable[[nn.Linear | nn.Conv2d, tuple[Tensor, ...]], None]:
        def add(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                rows = _rows(layer, inputs[0].detach().float())
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
        for handle in hooks:
            handle.remove()


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Return samples of a layer's inputs ``[N, I]``: some tokens, or patches at some positions.

    The distance between samples is odd. An upsampling repeats pixels in pairs, and so both are sampled.
    """
    from torch import nn

    if isinstance(layer, nn.Linear):
        if x.ndim > 2:
            x = x[..., :: _stride(x.shape[-2], TOKENS), :]
        return x.reshape(-1, x.shape[-1])
    sides = zip(layer.stride, x.shape[2:], strict=True)
    down, right = (stride * _stride(side // stride, POSITIONS) for stride, side in sides)
    padding = cast("tuple[int, ...]", layer.padding)
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, (down, right))
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _stride(size: int, samples: int) -> int:
    return max(size // samples, 1) | 1
