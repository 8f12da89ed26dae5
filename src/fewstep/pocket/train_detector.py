"""Train the scene detector on renderings, and export it as one ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.options import DEFAULT_COMPUTE, ComputeOptions, OutputFolder
from fewstep.train.run import Run, TrainOptions

if TYPE_CHECKING:
    from torch.nn import Module

    from fewstep.pocket.detector_data import ObjectBox
    from fewstep.pocket.detector_loss import DetectionBatch

SIZE = 128
"""Side of the detector's input images, pixels."""

ABOUT = "The detector of fewstep's scene score, trained on renderings alone: see docs/guides/evaluate.md."


def scene_detector(
    *,
    data: Path = Path("data/stickers"),
    output: OutputFolder = Path("runs/scene-detector"),
    steps: int = 1_500,
    batch_size: int = 24,
    lr: float = 2e-3,
    compute: ComputeOptions = DEFAULT_COMPUTE,
) -> Run:
    """Train the detector that judges scenes, on renderings alone.

    Args:
        data: The stickers data set, made by `fewstep data stickers`; only its renderings are used.
        output: Run folder; the detector is written to its subfolder `model`.
        steps: Training steps.
        batch_size: Images per step.
        lr: Learning rate.
        compute: Time limit, seed and hardware.
    """
    options = TrainOptions(steps, lr, decay=0.6, **asdict(compute), ema=0.99, clip=5.0)
    require_positive(batch_size=batch_size)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.pocket import render
    from fewstep.pocket.detector_data import DetectionDataset
    from fewstep.pocket.detector_loss import DetectorTraining
    from fewstep.pocket.detector_net import Detector

    dataset = DetectionDataset(render.load(data, SIZE), SIZE, compute.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed)
        net: Any = Detector()
        net = net.to(memory_format=torch.channels_last)

    def batches(step: int, part: BatchSlice) -> DetectionBatch:
        rows = range(batch_size)[part.slice_of(batch_size)]
        return collate([dataset(step * batch_size + row) for row in rows])

    def finish(nets: dict[str, Module]) -> None:
        with replacing_folder(output / "model") as folder:
            _export_onnx(nets["net"], folder / "detector.onnx")
            metadata = {"about": ABOUT, "license": "Apache-2.0", "size": SIZE}
            (folder / "detector.json").write_text(json.dumps(metadata, indent=1) + "\n")

    about = {"recipe": "scene-detector", "data": str(data), "batch": batch_size}
    return Run("scene-detector", output, DetectorTraining(net), batches, options, about, finish=finish)


def collate(samples: Sequence[tuple[NDArray[np.uint8], list[ObjectBox]]]) -> DetectionBatch:
    """Collate samples of :class:`fewstep.pocket.detector_data.DetectionDataset` into one batch.

    Args:
        samples: For each image its pixels, uint8 ``[h, w, 3]``, and the boxes of its objects.
    """
    import torch

    from fewstep.pocket.detector_loss import DetectionBatch
    from fewstep.pocket.detector_net import STRIDE

    images = np.stack([image for image, _ in samples]).transpose(0, 3, 1, 2)
    side = images.shape[-1] // STRIDE
    heat = np.zeros((len(samples), side, side), np.float32)
    centres = np.arange(side) + 0.5
    cells: list[int] = []
    boxes: list[tuple[float, float, float]] = []
    for index, (_, objects) in enumerate(samples):
        for box in objects:
            x, y = box.x * side, box.y * side
            column, row = (min(max(int(v), 0), side - 1) for v in (x, y))
            sigma = max(0.6, box.side * side / 9)
            peak = np.exp(
                -((centres - row - 0.5)[:, None] ** 2 + (centres - column - 0.5) ** 2) / 2 / sigma**2
            )
            heat[index] = np.maximum(heat[index], peak)
            heat[index, row, column] = 1
            cells.append((index * side + row) * side + column)
            boxes.append((x - column - 0.5, y - row - 0.5, float(np.log(box.side))))
    return DetectionBatch(
        torch.from_numpy(np.ascontiguousarray(images)).float(),
        torch.from_numpy(heat)[:, None],
        torch.tensor(cells),
        torch.tensor(boxes),
    )


def _export_onnx(net: Any, path: Path) -> None:
    """Write the net as an ONNX graph with 16-bit weights."""
    import torch

    from fewstep.export.common.graphs import GraphSpec, trace, write_graph
    from fewstep.export.common.onnx_quantize import quantize_weights

    net = net.float().eval().to(memory_format=torch.contiguous_format)
    spec = GraphSpec(net, {"images": torch.zeros(2, 3, SIZE, SIZE)}, ("heat", "box"))
    write_graph(quantize_weights(trace(spec), 16), path)
