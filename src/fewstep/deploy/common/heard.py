"""What the layers of a graph hear while real pictures are drawn (floor 3).

What an error in a weight costs depends on its input, and of inputs that come together the error of one can
make up for that of another. :func:`fewstep.deploy.common.weights.to_groups` rounds by that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

DAMPING = 0.1
"""Share of the mean square input that is added to each one's: prompts that come later bring inputs that were
not heard. Of 0.003, 0.01, 0.03 and 0.1 the last was best for Pocket."""

SIDE = 32
"""Of a larger plane of outputs a convolution is listened to at about so many places a side."""


@dataclass(frozen=True, eq=False)
class Heard:
    """A layer's weight and the inputs that met it.

    Attributes:
        weight: float32, its first axis the outputs; the layer's own memory.
        gram: sums of products of its inputs, float32 ``[I, I]``; ``I`` are all axes but the first.
    """

    weight: np.ndarray
    gram: np.ndarray

    def turned(self, array: np.ndarray) -> bool:
        """Whether ``array``, the same weight in an exported graph, has its inputs first."""
        return not np.array_equal(array.squeeze(), self.weight.squeeze())

    def lost(self, back: np.ndarray) -> float:
        """Squared error of the outputs, summed over all inputs heard, if ``back`` stood for the weight."""
        off = (back - self.weight).reshape(len(back), -1)
        return float(((off @ self.gram) * off).sum())

    @property
    def factor(self) -> np.ndarray:
        """Upper triangular, float32 ``[I, I]``: the Cholesky factor of the damped inverse of ``gram``."""
        return _factor(self)


@lru_cache(maxsize=1)  # asked for at every width of one weight after the other; of SD3.5 they are gigabytes
def _factor(heard: Heard) -> np.ndarray:
    whole = heard.gram.astype(np.float64)
    whole[np.diag_indices_from(whole)] += DAMPING * whole.diagonal().mean()
    return np.linalg.cholesky(np.linalg.inv(whole)).T.astype(np.float32)


@contextmanager
def listening(modules: Mapping[str, Any]) -> Generator[Callable[[], dict[tuple[str, str], Heard]]]:
    """Listen to every linear layer and convolution of several graphs while they run.

    Args:
        modules: torch modules by the name of their graph.

    Yields:
        What tells, when it is called, what was heard: by graph and name of the weight in it.
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
            key: Heard(layers[key].weight.detach().numpy(), gram.numpy())
            for key, gram in sums.items()
            if gram.any()
        }
    finally:
        for each in hooks:
            each.remove()


def _rows(layer: Any, x: Any) -> Any:
    """What meets the weight, ``[N, I]``; of a convolution the patches at some places.

    Those lie an odd number of places apart: of what an upsampling laid down in pairs all sides are heard.
    """
    from torch import nn

    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    sides = zip(layer.stride, x.shape[2:], strict=True)
    down, right = (stride * (max(side // stride // SIDE, 1) | 1) for stride, side in sides)
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, (down, right))
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
