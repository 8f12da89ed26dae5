"""The judge of the scene score: a detector trained on renderings, as one small graph."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.core.types import BatchSlice
from fewstep.core.validate import require_positive
from fewstep.pocket.assemble import MEANS, ComputeOptions, Out
from fewstep.train.run import Run, TrainOptions

SIZE = 128
"""Side of the pictures that it looks at, pixels."""

ABOUT = "The judge of fewstep's scene score, trained on renderings alone: see docs/evaluation.md."


def scene_detector(
    *,
    data: Path = Path("data/stickers"),
    output: Out = Path("runs/scene-detector"),
    steps: int = 1_500,
    batch_size: int = 24,
    lr: float = 2e-3,
    means: ComputeOptions = MEANS,
) -> Run:
    """Train the detector that judges scenes, on renderings alone.

    Args:
        data: The stickers data set, made by `fewstep data stickers`; only its renderings are used.
        output: Run folder; the detector is written to its subfolder `model`.
        steps: Updates in all.
        batch_size: Pictures an update.
        lr: Learning rate.
        means: How long, and on what.
    """
    options = TrainOptions(steps, lr, decay=0.6, **asdict(means), ema=0.99, clip=5.0)
    require_positive(batch_size=batch_size)

    import torch

    from fewstep.core.atomic import replacing_folder
    from fewstep.pocket import render
    from fewstep.pocket.detector_data import DetectionDataset
    from fewstep.pocket.detector_loss import DetectorTraining
    from fewstep.pocket.detector_net import Detector

    crowds = DetectionDataset(render.load(data, SIZE), SIZE, means.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(means.seed)
        net: Any = Detector()
        net = net.to(memory_format=torch.channels_last)

    def batches(step: int, share: BatchSlice) -> Any:
        return collate([crowds(step * batch_size + i) for i in range(batch_size)[share.slice_of(batch_size)]])

    def finish(nets: dict[str, Any]) -> None:
        with replacing_folder(output / "model") as folder:
            _write(nets["net"], folder / "detector.onnx")
            told = {"about": ABOUT, "license": "Apache-2.0", "size": SIZE}
            (folder / "detector.json").write_text(json.dumps(told, indent=1) + "\n")

    about = {"recipe": "scene-detector", "data": str(data), "batch": batch_size}
    return Run("scene-detector", output, DetectorTraining(net), batches, options, about, finish=finish)


def collate(drawn: list[Any]) -> Any:
    """Pictures of :class:`fewstep.pocket.detector_data.DetectionDataset` and their things, as one batch.

    Args:
        drawn: (uint8 ``[h, w, 3]``, things) each.
    """
    import torch

    from fewstep.pocket.detector_loss import Pictures
    from fewstep.pocket.detector_net import STRIDE

    images = np.stack([picture for picture, _ in drawn]).transpose(0, 3, 1, 2)
    side = images.shape[-1] // STRIDE
    heat = np.zeros((len(drawn), side, side), np.float32)
    across = np.arange(side) + 0.5
    cells: list[int] = []
    boxes: list[tuple[float, float, float]] = []
    for index, (_, found) in enumerate(drawn):
        for thing in found:
            x, y = thing.x * side, thing.y * side
            column, row = (min(max(int(v), 0), side - 1) for v in (x, y))
            spread = max(0.6, thing.side * side / 9)
            hill = np.exp(
                -((across - row - 0.5)[:, None] ** 2 + (across - column - 0.5) ** 2) / 2 / spread**2
            )
            heat[index] = np.maximum(heat[index], hill)
            heat[index, row, column] = 1
            cells.append((index * side + row) * side + column)
            boxes.append((x - column - 0.5, y - row - 0.5, float(np.log(thing.side))))
    return Pictures(
        torch.from_numpy(np.ascontiguousarray(images)).float(),
        torch.from_numpy(heat)[:, None],
        torch.tensor(cells),
        torch.tensor(boxes),
    )


def _write(net: Any, path: Path) -> None:
    """The net as an ONNX graph with weights of 16 bits."""
    import torch

    from fewstep.export.common.graphs import GraphSpec, trace, write_graph
    from fewstep.export.common.onnx_quantize import quantize_weights

    net = net.float().eval().to(memory_format=torch.contiguous_format)
    part = GraphSpec(net, {"images": torch.zeros(2, 3, SIZE, SIZE)}, ("heat", "box"))
    write_graph(quantize_weights(trace(part), 16), path)
