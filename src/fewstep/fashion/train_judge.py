"""Train the judge of the Fashion-MNIST benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.fashion import data as fashion
from fewstep.methods.base import Losses, StepRandom, Update
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class _Batch:
    """Images ``[B, 1, 28, 28]`` in [-1, 1] and classes ``[B]``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Classification:
    """Cross entropy of a classifier."""

    net: Module

    @property
    def nets(self) -> dict[str, Module]:
        return {"net": self.net}

    def updates(self, step: int) -> Sequence[Update]:
        return [Update("net", self.losses)]

    def losses(self, batch: Any, random: StepRandom) -> Losses:
        """Return the loss, with labels smoothed by a tenth, and the share that is right."""
        from torch.nn.functional import cross_entropy

        logits = self.net(batch.images)
        right = (logits.argmax(1) == batch.labels).float().mean()
        return {
            "entropy": cross_entropy(logits, batch.labels, label_smoothing=0.1),
            "right": right.detach(),
        }


def fashion_judge(
    *,
    data: Path = Path("data/fashion"),
    output: OutputFolder = Path("runs/fashion-judge"),
    steps: int = 4000,
    batch_size: int = 128,
    lr: float = 2e-3,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train the judge of the Fashion-MNIST benchmark: a CNN that names the ten classes.

    Args:
        data: The data set, of `fewstep data fashion`.
        output: Run folder; the judge and its test accuracy are written to its subfolder `model`.
        steps: Training steps.
        batch_size: Images per step.
        lr: Learning rate.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(steps, lr, decay=0.5, **asdict(compute), ema=0.995, precision="fp32")
    require_positive(batch_size=batch_size)

    import torch

    from fewstep.data import sampler
    from fewstep.fashion.judge import Judge, pixels

    training = fashion.load(data, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed)
        net = Judge()

    def batches(step: int, part: BatchSlice) -> _Batch:
        rows = sampler.batch_indices(len(training), step, batch_size, compute.seed)
        images, labels = training.images[rows], torch.from_numpy(training.labels[rows])
        images = _augment(images, np.random.Generator(np.random.Philox(key=[compute.seed, step])))
        own = part.slice_of(batch_size)
        return _Batch(pixels(images[own]), labels[own])

    def finish(nets: dict[str, Module]) -> None:
        write(nets["net"], data, output / "model")

    about = {"recipe": "fashion-judge", "data": str(data), "batch": batch_size}
    return Run("fashion-judge", output, Classification(net), batches, options, about, finish=finish)


def write(net: Any, data: Path, folder: Path) -> None:
    """Write a judge with the scale of its features, and the share of test images that it names rightly."""
    import json

    from safetensors.torch import save_file

    from fewstep.core.atomic import replacing_folder
    from fewstep.evaluate.metrics.frechet import frechet, moments
    from fewstep.fashion.judge import FILE, UNIT, UNIT_IMAGES, UNIT_SETS

    training, test = fashion.load(data, "train"), fashion.load(data, "test")
    net.scale.fill_(1.0)
    features, classes = net.judge(test.images)
    sets = np.array_split(net.judge(training.images[: UNIT_IMAGES * UNIT_SETS])[0], UNIT_SETS)
    distance = np.mean([frechet(moments(own), moments(features)) for own in sets])
    net.scale.fill_(float((UNIT / distance) ** 0.5))
    facts = {"test_accuracy": float((classes == test.labels).mean()), "scale": float(net.scale)}
    with replacing_folder(folder) as fresh:
        save_file({name: tensor.cpu() for name, tensor in net.state_dict().items()}, fresh / FILE)
        (fresh / "judge.json").write_text(json.dumps(facts, indent=1) + "\n")


def _augment(images: Any, rng: np.random.Generator) -> Any:
    """Move each image by up to two pixels."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    moves = rng.integers(0, 5, (len(images), 2))
    return np.stack(
        [
            image[y : y + fashion.SIDE, x : x + fashion.SIDE]
            for image, (x, y) in zip(padded, moves, strict=True)
        ]
    )
