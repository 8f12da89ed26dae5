from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewstep.core.types import Model, UserError, Velocity
from fewstep.pipeline.resolve import SHIPPED
from fewstep.runtime.model import open_bundle
from fewstep.runtime.ort import Graph
from tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_bundle(write_bundle(tmp_path_factory.mktemp("graph")), threads=1)


def test_parts_keep_the_contract(model: Model) -> None:
    cond = model.text(["a cat", "a dog"])
    assert cond.context.shape[0] == cond.pooled.shape[0] == 2
    assert isinstance(model.velocity, Velocity)
    x = np.ones((2, *model.latent), np.float32)
    v = model.velocity(x, np.array([1.0, 0.5], np.float32), cond)
    assert v.shape == x.shape and v.dtype == np.float32
    assert not np.allclose(v[0], v[1])
    images = model.codec.decode(x)
    assert images.shape == (2, 3, 32, 32)
    assert model.codec.encode(images).shape == x.shape


def test_rows_do_not_depend_on_their_batch(model: Model) -> None:
    prompts = ["a cat", "a dog", "a red apple"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *model.latent), dtype=np.float32)
    t = np.array([0.9, 0.5, 0.1], np.float32)
    cond = model.text(prompts)
    together = model.velocity(x, t, cond)
    for row in range(3):
        at = slice(row, row + 1)
        alone = model.velocity(x[at], t[at], cond[at])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"text\.onnx cannot be loaded by onnxruntime") as caught:
        Graph(path, 1)(tokens=np.zeros((1, 2), np.int64))
    assert "\n" not in str(caught.value)


def test_a_bundle_without_encoder_still_draws(tmp_path: Path) -> None:
    from fewstep.runtime.bundle import write_manifest
    from tiny_bundle import FACTS

    write_bundle(tmp_path)
    (tmp_path / "encoder.onnx").unlink()
    model = open_bundle(write_manifest(tmp_path, FACTS), threads=1)
    images = model.codec.decode(np.zeros((1, *model.latent), np.float32))
    with pytest.raises(UserError, match=r"model tiny has no encoder\.onnx"):
        model.codec.encode(images)


GRAPH = f"""
import numpy as np
from pathlib import Path
from fewstep.runtime.ort import Graph
latents = np.zeros((1, 16, 16, 16), np.float32)
Graph(Path({str(SHIPPED / "pocket" / "decoder.onnx")!r}), 1)(latents=latents)
"""
FEATURES = "from fewstep.evaluate.features import OpenNsfwPool; OpenNsfwPool()"


@pytest.mark.parametrize("code", [GRAPH, FEATURES], ids=["graph", "features"])
def test_onnxruntime_tells_nobody_and_leaves_no_id(tmp_path: Path, code: str) -> None:
    """Its own notice says that it does, unless told otherwise before it is imported."""
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=inherited | places)
    assert not list(tmp_path.rglob("*"))
