"""The detector of scenes: its targets are where the things are, and its graph says what the net says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers import tiny_stickers

from fewstep.methods.base import StepRandom
from fewstep.pocket import render
from fewstep.pocket.detector import BoxDetector
from fewstep.pocket.detector_data import DetectionDataset, ObjectBox
from fewstep.pocket.detector_loss import DetectorTraining
from fewstep.pocket.detector_net import STRIDE
from fewstep.pocket.options import ComputeOptions
from fewstep.pocket.train_detector import collate, scene_detector
from fewstep.runtime.ort import Graph
from fewstep.train.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stickers.make(tmp_path_factory.mktemp("tiny") / "data", 1)


def test_targets_lead_back_to_the_things() -> None:
    things = [ObjectBox(0.3, 0.7, 0.4), ObjectBox(0.9, 0.2, 0.25)]
    page = np.zeros((128, 128, 3), np.uint8)
    batch = collate([(page, things), (page, things[:1])])
    side = 128 // STRIDE
    assert batch.heat.shape == (2, 1, side, side)
    assert (batch.heat == 1).sum((1, 2, 3)).tolist() == [2, 1]
    for cell, (dx, dy, size), thing in zip(batch.cells, batch.boxes, [*things, things[0]], strict=True):
        row, column = divmod(int(cell) % side**2, side)
        assert batch.heat.flatten()[cell] == 1
        assert (column + 0.5 + float(dx)) / side == pytest.approx(thing.x)
        assert (row + 0.5 + float(dy)) / side == pytest.approx(thing.y)
        assert float(size.exp()) == pytest.approx(thing.side)


def test_perfect_maps_cost_nothing(data: Path) -> None:
    crowds = DetectionDataset(render.load(data, 128), 128)
    batch = collate([crowds(i) for i in range(3)])

    class Knowing:
        def maps(self, images: object) -> tuple[object, object]:
            boxes = torch.zeros(3, 3, *batch.heat.shape[2:]).permute(0, 2, 3, 1).flatten(0, 2)
            boxes[batch.cells] = batch.boxes
            boxes = boxes.unflatten(0, (3, *batch.heat.shape[2:])).permute(0, 3, 1, 2)
            return (batch.heat - 0.999) * 1e5, boxes

    losses = DetectorTraining(Knowing()).losses(batch, StepRandom(None, None))
    assert float(losses["heat"]) == pytest.approx(0, abs=1e-6)
    assert float(losses["box"]) == 0


def test_the_recipe_leaves_a_graph_that_says_what_the_net_says(data: Path, tmp_path: Path) -> None:
    run = scene_detector(data=data, output=tmp_path, steps=2, batch_size=2, compute=ComputeOptions(threads=1))
    train(run)
    assert json.loads((tmp_path / "model/detector.json").read_text())["size"] == 128
    pictures = np.stack([DetectionDataset(render.load(data, 128))(i)[0].transpose(2, 0, 1) for i in range(3)])
    heat, box = Graph(tmp_path / "model/detector.onnx", 1)(images=pictures.astype(np.float32))
    assert (heat.shape, box.shape) == ((3, 1, 16, 16), (3, 3, 16, 16))
    assert heat.min() >= 0
    assert heat.max() <= 1
    assert len(BoxDetector(tmp_path / "model")(pictures)) == 3
    net = run.method.nets["net"]  # a finished run's nets hold their averages
    with torch.no_grad():
        own = net.eval()(torch.from_numpy(pictures).float())
    for graph, torchs in zip((heat, box), own, strict=True):
        # Weights of 16 bits.
        np.testing.assert_allclose(graph, torchs.numpy(), atol=5e-3)
