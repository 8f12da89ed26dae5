"""Compare ways to store the weights of a net: size, start-up time, speed, and PSNR of the images.

    python tools/compare_weights.py models/pocket-teacher   # a diffusers folder

Times are the least processor time of several rounds on one thread, which a busy machine changes little.
docs/results/tried.md has the table that this program prints.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fewstep.core import sampling, schedule
from fewstep.export.common import graphs
from fewstep.export.common.onnx_quantize import quantize_weights, to_int8
from fewstep.families import sd3
from fewstep.families.base import Family
from fewstep.runtime.ort import ort

PROMPTS = ["a red apple, 3D style", "a cat face, flat style", "two blue books", "noto style guitar"]
ROUNDS = 6


def dequantized(model: Any, folder: Path) -> Any:
    """Store int8 weights behind ``DequantizeLinear``, which onnxruntime runs at every step."""
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept, nodes = [], []
    for weight in result.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.ndim != 2 or array.size < 4096:
            kept.append(weight)
            continue
        codes, scale = to_int8(array)
        name = weight.name
        kept.append(numpy_helper.from_array(codes, name + ".int8"))
        kept.append(numpy_helper.from_array(scale.ravel(), name + ".scale"))
        inputs, axis = [name + ".int8", name + ".scale"], int(scale.shape[0] == 1)
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axis))
    nodes.extend(result.graph.node)
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.initializer.extend(kept)
    result.graph.node.extend(nodes)
    return result


def dynamic(kind: str, reduce_range: bool = False) -> Callable[[Any, Path], Any]:
    """onnxruntime's dynamic quantization: integer matrix products, activations scaled at run time."""

    def make(model: Any, folder: Path) -> Any:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole, small = folder / "whole.onnx", folder / "small.onnx"
        onnx.save_model(model, str(whole))
        quantize_dynamic(
            whole,
            small,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType[kind],
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(str(small))

    return make


def blockwise(level: int) -> Callable[[Any, Path], Any]:
    """``MatMulNBits`` with 8 bits, blocks of 32, and onnxruntime's accuracy level."""

    def make(model: Any, folder: Path) -> Any:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        quantizer = MatMulNBitsQuantizer(copy, bits=8, block_size=32, is_symmetric=True, accuracy_level=level)
        quantizer.process()
        return quantizer.model.model

    return make


VARIANTS: dict[str, Callable[[Any, Path], Any]] = {
    "float32": lambda model, _: model,
    "float16, cast at start": lambda model, _: quantize_weights(model, 16),
    "**int8, scaled at start**": lambda model, _: quantize_weights(model, 8),
    "int8, `DequantizeLinear`": dequantized,
    "`MatMulNBits`, level 0": blockwise(0),
    "`MatMulNBits`, level 1": blockwise(1),
    "`MatMulNBits`, level 4": blockwise(4),
    "dynamic int8": dynamic("QInt8"),
    "dynamic int8, 7 bits": dynamic("QInt8", reduce_range=True),
    "dynamic uint8": dynamic("QUInt8"),
}


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def least(action: Callable[[], Any], rounds: int) -> float:
    """Return the least processor time of ``action`` in milliseconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
        gc.collect()
    return 1000 * best


def draw(net: Any, family: Family, cond: Any, rows: slice) -> np.ndarray:
    """Return images ``[B, 3, h, w]`` in [0, 255] after four steps. Only the net is an ONNX session."""
    import torch

    def velocity(x: Any, t: Any, c: Any) -> Any:
        return net.run(None, {"x": x, "t": t, "context": c.context, "pooled": c.pooled})[0]

    noise = sampling.batch_noise(range(len(PROMPTS)), family.latent)[rows]
    latents = sampling.sample_flow(velocity, noise, schedule.grid(4, family.shift), cond[rows])
    with torch.no_grad():
        images = family.codec.decode(torch.from_numpy(latents)).numpy()
    return images.clip(-1, 1) * 127.5 + 127.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(20 * np.log10(255 / max(np.sqrt(np.square(a - b).mean()), 1e-6)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a diffusers folder")
    logging.disable(logging.INFO)  # the quantizers log every node
    family = sd3.load(parser.parse_args().folder, t5=False)
    model = graphs.trace(graphs.parts(family)["transformer"])
    cond = family.text(PROMPTS).map(lambda tensor: tensor.numpy())
    columns = ["weights", "MB", "start, ms", "step, ms", "four, ms", "to float32, dB", "one to four, dB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    reference = None
    for name, make in VARIANTS.items():
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "net.onnx"
            onnx.save_model(make(model, Path(place)), str(path))
            size = path.stat().st_size / 1e6
            create = least(lambda path=path: session(path), ROUNDS)
            net = session(path)
        steps = []
        for batch in (1, 4):
            feeds = {
                "x": sampling.batch_noise(range(batch), family.latent),
                "t": np.full(batch, 0.75, np.float32),
                "context": cond.context[:batch],
                "pooled": cond.pooled[:batch],
            }
            steps.append(least(lambda net=net, feeds=feeds: net.run(None, feeds), 5 * ROUNDS))
        images = draw(net, family, cond, slice(0, 4))
        reference = images if reference is None else reference
        single = draw(net, family, cond, slice(0, 1))
        losses = [psnr(reference, images), psnr(images[:1], single)]
        shown = ["equal" if loss > 100 else f"{loss:.1f}" for loss in losses]
        row = [name, f"{size:.1f}", f"{create:.0f}", *(f"{step:.1f}" for step in steps), *shown]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
