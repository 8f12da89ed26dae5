"""A tiny random bundle, built in a moment from ONNX nodes: the real formats, a 32-pixel picture.

Its velocity depends on every input, so that a prompt, a seed or a time that gets lost on the way
changes the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fewstep.runtime.bundle import Bundle, write_manifest

CHANNELS, SIDE, DOWNSCALE, LENGTH, WIDTH, POOLED = 4, 4, 8, 24, 8, 6
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
FACTS: dict[str, Any] = {
    "name": "tiny",
    "family": "sd3",
    "license": "MIT",
    "latent": {"channels": CHANNELS, "height": SIDE, "width": SIDE, "downscale": DOWNSCALE},
    "shift": 3.0,
    "steps": 4,
    "guidance": None,
    "text": {"length": LENGTH},
    "about": {"styles": ["3D", "flat"]},
}


def write_bundle(folder: Path, **changes: Any) -> Bundle:
    """Write a tiny bundle; ``changes`` replace fields of its ``bundle.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    graphs = {
        "text": _text(rng, tokenizer.get_vocab_size()),
        "modulation": _modulation(rng),
        "transformer": _transformer(rng),
        "decoder": _decoder(rng),
        "encoder": _encoder(rng),
    }
    for name, graph in graphs.items():
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString())
    return write_manifest(folder, {**FACTS, **changes})


def write_openvino_bundle(folder: Path, **changes: Any) -> Bundle:
    """The same for OpenVINO, which must be installed."""
    from fewstep.runtime.openvino import openvino

    write_bundle(folder)
    for path in list(folder.glob("*.onnx")):
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})
        openvino.save_model(core.read_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
        path.unlink()
    return write_manifest(folder, {**FACTS, "engine": "openvino", **changes})


def _tokenizer() -> Tokenizer:
    """CLIP's way: lower case, one token a letter here, start and end marks."""
    signs = ["<|startoftext|>", "<|endoftext|>", "<unk>", *LETTERS, *(f"{sign}</w>" for sign in LETTERS)]
    vocabulary = {sign: number for number, sign in enumerate(signs)}
    model = models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>", unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    marks = [("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=marks
    )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=1, pad_token="<|endoftext|>", length=LENGTH)
    return tokenizer


def _weight(rng: np.random.Generator, name: str, *shape: int) -> TensorProto:
    values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)
    return numpy_helper.from_array(values.astype(np.float32), name)


def _graph(
    nodes: list[Any], weights: list[TensorProto], inputs: dict[str, Any], outputs: dict[str, Any]
) -> ModelProto:
    def ports(named: dict[str, Any]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name == "tokens" else TensorProto.FLOAT, ["B", *shape]
            )
            for name, shape in named.items()
        ]

    graph = helper.make_graph(nodes, "tiny", ports(inputs), ports(outputs), weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _text(rng: np.random.Generator, vocabulary: int) -> ModelProto:
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["looked"]),
        helper.make_node("Mul", ["looked", "places"], ["context"]),
        helper.make_node("ReduceMean", ["context"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "out"], ["pooled"]),
    ]
    weights = [
        _weight(rng, "table", vocabulary, WIDTH), _weight(rng, "places", 1, LENGTH, WIDTH),
        _weight(rng, "out", WIDTH, POOLED),
    ]  # fmt: skip
    shapes = {"context": [LENGTH, WIDTH], "pooled": [POOLED]}
    return _graph(nodes, weights, {"tokens": [LENGTH]}, shapes)


SIZE = CHANNELS * SIDE * SIDE


def _modulation(rng: np.random.Generator) -> ModelProto:
    """``linear(pooled) + t * bias``."""
    nodes = [
        helper.make_node("MatMul", ["pooled", "from_pooled"], ["a"]),
        helper.make_node("Reshape", ["t", "column"], ["times"]),
        helper.make_node("MatMul", ["times", "from_time"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["modulation"]),
    ]
    weights = [
        _weight(rng, "from_pooled", POOLED, SIZE), _weight(rng, "from_time", 1, SIZE),
        numpy_helper.from_array(np.array([-1, 1]), "column"),
    ]  # fmt: skip
    return _graph(nodes, weights, {"t": [], "pooled": [POOLED]}, {"modulation": [SIZE]})


def _transformer(rng: np.random.Generator) -> ModelProto:
    """``v = conv(x) + linear(mean context) + modulation``."""
    latent = [CHANNELS, SIDE, SIDE]
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["context"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "from_context"], ["b"]),
        helper.make_node("Add", ["modulation", "b"], ["flat"]),
        helper.make_node("Reshape", ["flat", "latent"], ["said"]),
        helper.make_node("Add", ["seen", "said"], ["velocity"]),
    ]
    weights = [
        _weight(rng, "kernel", CHANNELS, CHANNELS, 3, 3), _weight(rng, "from_context", WIDTH, SIZE),
        numpy_helper.from_array(np.array([-1, *latent]), "latent"),
    ]  # fmt: skip
    inputs = {"x": latent, "context": [LENGTH, WIDTH], "modulation": [SIZE]}
    return _graph(nodes, weights, inputs, {"velocity": latent})


def _decoder(rng: np.random.Generator) -> ModelProto:
    nodes = [
        helper.make_node("Conv", ["latents", "kernel"], ["deep"]),
        helper.make_node("DepthToSpace", ["deep"], ["wide"], blocksize=DOWNSCALE),
        helper.make_node("Tanh", ["wide"], ["images"]),
    ]
    kernel = _weight(rng, "kernel", 3 * DOWNSCALE**2, CHANNELS, 1, 1)
    side = SIDE * DOWNSCALE
    return _graph(nodes, [kernel], {"latents": [CHANNELS, SIDE, SIDE]}, {"images": [3, side, side]})


def _encoder(rng: np.random.Generator) -> ModelProto:
    nodes = [
        helper.make_node("SpaceToDepth", ["images"], ["deep"], blocksize=DOWNSCALE),
        helper.make_node("Conv", ["deep", "kernel"], ["latents"]),
    ]
    kernel = _weight(rng, "kernel", CHANNELS, 3 * DOWNSCALE**2, 1, 1)
    side = SIDE * DOWNSCALE
    return _graph(nodes, [kernel], {"images": [3, side, side]}, {"latents": [CHANNELS, SIDE, SIDE]})
