"""What parts and stages hold in memory, found by shapes alone (floor 3, torch).

The very modules run on tensors without bytes, and every storage is counted (:mod:`fewstep.nets.ledger`). Of
weights in 8 bits on a CPU the layers run as torchao runs them. A GPU's kernels of 8 and 4 bits cannot run
here: what they hold beside the layer's own tensors is written down below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from fewstep.families.common import LatentCodec
from fewstep.nets.hoist import Hoisted, hoisted
from fewstep.nets.ledger import ALLOCATED, WORKSPACE, imagined, renewed
from fewstep.staged.outline import Outline
from fewstep.staged.parts import bare, made
from fewstep.staged.plan import Asked, Choice, Counted, Sizes
from fewstep.staged.quantize import in_bytes
from fewstep.types import Cond


@dataclass(frozen=True)
class Weight:
    """One tensor of a part: its name, its shape, and whether it is a weight that may have few bits."""

    name: str
    shape: tuple[int, ...]
    few: bool


def quantizable(outline: Outline, part: str, net: Any) -> frozenset[str]:
    """Names of the linear layers that are stored in few bits: those of the blocks, of the net and of T5.

    What all tokens share, the modulations and the CLIPs keep theirs: they are small, or leave the device.
    """
    blocks = {
        "transformer": ("transformer_blocks.", "single_transformer_blocks."),
        str(outline.t5): ("encoder.block.",),
    }.get(part, ())
    return frozenset(
        path
        for path, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and blocks and path.startswith(blocks) and ".norm" not in path
    )


@dataclass(frozen=True)
class Rehearsal:
    """A model's sizes.

    Attributes:
        outline: of the model; with a tiny decoder, which is its part ``decoder``.
        family: its family, of stand-ins.
        asked: what it is to do.
    """

    outline: Outline
    family: Any
    asked: Asked

    @cached_property
    def sizes(self) -> Sizes:
        """What a plan asks for, each counted once."""
        return Sizes(
            cache(self.weights),
            cache(self.layer),
            cache(self.reading),
            cache(self.encoding),
            cache(self.stepping),
            cache(self.decoding),
            cache(self.coding),
        )

    def counted(self, choice: Choice) -> Counted:
        """The stages of a choice."""
        outline = self.outline
        return Counted(self.asked, self.sizes, outline.encoders, outline.t5, outline.decoder, choice)

    def dtype(self, bits: int) -> torch.dtype:
        """What a part of so many bits computes in."""
        return torch.float32 if (bits if bits >= 16 else self.asked.native) == 32 else torch.bfloat16

    @cached_property
    def tensors(self) -> Mapping[str, list[Weight]]:
        """The tensors of each part; the modulations are a part of their own."""
        found: dict[str, list[Weight]] = {}
        for part in self.outline.configs:
            net = bare(self.outline, part, torch.float32)
            few = {f"{name}.weight" for name in quantizable(self.outline, part, net)}
            held = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
            tied = getattr(net, "_tied_weights_keys", None) or {}
            found[part] = [Weight(n, self._cut(n, t), n in few) for n, t in held if n not in tied]
        apart = [w for w in found["transformer"] if _modulates(w.name)]
        found["modulation"] = apart
        found["transformer"] = [w for w in found["transformer"] if w not in apart]
        return found

    def _cut(self, name: str, tensor: Any) -> tuple[int, ...]:
        if name != "pos_embed.pos_embed":
            return tuple(tensor.shape)
        return (1, window_side(self.outline, self.asked.latents) ** 2, tensor.shape[-1])

    def _of(self, weight: Weight, bits: int) -> int:
        wide = self.dtype(bits).itemsize
        if weight.few and bits < 16:
            count = in_bytes(weight.shape[0], weight.shape[1], bits, wide)
        else:
            count = wide * _count(weight.shape)
        return -(-count // ALLOCATED) * ALLOCATED if self.asked.gpu else count

    def weights(self, part: str, bits: int) -> int:
        return sum(self._of(weight, bits) for weight in self.tensors[part])

    def layer(self, bits: int) -> int:
        """The largest layer of the modulations."""
        return max(self._of(weight, bits) for weight in self.tensors["modulation"])

    def reading(self, part: str, bits: int) -> int:
        """At most while it is read: a tensor as its file has it, beside what it is cast or quantized to."""
        stored = self.outline.stored.get(part, 2)
        wide = self.dtype(bits).itemsize
        so_far, most = 0, 0
        for weight in self.tensors[part]:
            count = _count(weight.shape)
            so_far += self._of(weight, bits)
            beside = 0 if self.asked.gpu or stored == wide else stored * count
            if weight.few and bits < 16:
                beside += (wide + 4 * QUANTIZING) * count
            most = max(most, so_far + beside)
        return most

    def encoding(self, part: str, bits: int) -> int:
        """While it reads a prompt."""
        clip = not self.outline.classes[part][1].startswith("T5")
        hidden = {"output_hidden_states": True} if clip and self.outline.kind == "sd3" else {}
        length = self.outline.words[part]
        config = self.outline.configs[part]
        kept = length * config["hidden_size"] * max(config["num_hidden_layers"] - FEW, 0) if hidden else 0

        def run(net: Any) -> Any:
            return net(torch.zeros(1, length, dtype=torch.long), **hidden)

        return self._beside(part, bits, run) + kept * self.dtype(bits).itemsize

    def stepping(self, bits: int, batch: int) -> int:
        """While it walks: modulations of all steps, and a step."""
        rows, channels = batch * self.asked.rows, self.family.latent[0]
        height, width = self.asked.latents
        config = self.outline.configs["transformer"]
        words = self.outline.words
        length = sum(words[part] for part in self.outline.encoders if part == self.outline.t5)
        if self.outline.kind == "sd3":
            length += min(words[part] for part in self.outline.encoders if part != self.outline.t5)

        def run(net: Any) -> Any:
            velocity = type(self.family.velocity)(net)
            x = torch.zeros(rows, channels, height, width)
            context = torch.zeros(rows, length, config["joint_attention_dim"])
            cond = Cond(context, torch.zeros(rows, config["pooled_projection_dim"]))
            steps = Hoisted(velocity).steps([0.5] * self.asked.steps, cond)
            return x, [step(x) for step in steps[:1]]

        beside = self._beside("transformer", bits, run)
        # The rehearsed net has few blocks; the real one is given the modulations of all.
        left_out = self._made(self.outline) - self._made(shortened(self.outline, "transformer"))
        beside += self.asked.steps * rows * left_out * self.dtype(bits).itemsize
        tokens = (height // self.outline.patch) * (width // self.outline.patch)
        workspace = WORKSPACE // 2 if self.asked.gpu else 0  # of one thread
        return beside + self._kernels(bits, rows * (tokens + length)) + workspace

    def _made(self, outline: Outline) -> int:
        """Numbers of all modulations of a sample at one time."""
        net = bare(outline, "transformer", torch.float32)
        layers: Any = hoisted(net)[0].layers
        return sum(layer.out_features for layer in layers)

    def _kernels(self, bits: int, rows: int) -> int:
        """What a GPU's kernels of few bits hold beside a layer's tensors: of 8 bits the activations in
        float32 and in integers and the products in 32-bit integers; of 4 bits the activations, filled up."""
        if not self.asked.gpu or bits >= 16:
            return 0
        shapes = [w.shape for w in self.tensors["transformer"] if w.few]
        if bits == 8:
            return max(rows * (5 * wide + 4 * tall) for tall, wide in shapes)
        return max(2 * rows * -(-wide // 1024) * 1024 for _, wide in shapes)

    def decoding(self, tiles: int, batch: int) -> int:
        """While latents become pixels."""
        channels, (height, width) = self.family.latent[0], self.asked.latents

        def run(net: Any) -> Any:
            latents = torch.zeros(batch, channels, height, width)
            return latents, sliced(net, tiles, (height, width), self.outline.downscale).decode(
                latents
            ).float()

        return self._beside(self.outline.decoder, self.asked.native, run)

    def coding(self, tiles: int) -> int:
        """While the picture to start from becomes latents."""
        height, width = self.asked.latents
        down = self.outline.downscale

        def run(net: Any) -> Any:
            images = torch.zeros(1, 3, down * height, down * width)
            return images, sliced(net, tiles, (height, width), down).encode(images)

        return self._beside("vae", self.asked.native, run)

    def _beside(self, part: str, bits: int, run: Callable[[Any], Any]) -> int:
        """Bytes beside its weights while a part runs, as ``run`` runs it."""
        with self._ledger() as ledger, torch.no_grad():
            short = shortened(self.outline, part)
            net = renewed(made(short, part), self.dtype(bits)).eval()
            if bits < 16 and not self.asked.gpu:
                emulate(net, quantizable(short, part, net))
            ledger.begin(part)
            before = sum(ledger.live.values())
            kept = run(net)
            most = ledger.peaks[part].total - before
            del kept
        return most

    @contextmanager
    def _ledger(self) -> Any:
        with warnings.catch_warnings(), imagined(gpu=self.asked.gpu) as ledger:
            warnings.simplefilter("ignore")  # torch's, about fake tensors
            yield ledger


QUANTIZING = 3
"""Float32 copies of a weight while torchao quantizes it."""


FEW = 2
"""Layers of a text encoder that are rehearsed: the others hold as much, one after the other."""


def shortened(outline: Outline, part: str) -> Outline:
    """The outline with a net of no more blocks than it has kinds of them; the last of SD3's is a kind."""
    config = dict(outline.configs[part])
    for name in ("num_layers", "num_hidden_layers", "num_single_layers"):
        if name in config:
            config[name] = min(int(config[name]), FEW + (part == "transformer"))
    if config.get("dual_attention_layers"):
        config["dual_attention_layers"] = (0,)
    return replace(outline, configs={**outline.configs, part: config})


def emulate(net: Any, names: frozenset[str]) -> None:
    """Let layers run as torchao runs weights of 8 bits on a CPU: their weight is cast, then multiplied."""
    for path in names:
        layer = net.get_submodule(path)
        weight = layer.weight
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        layer.register_buffer("scale", torch.zeros(weight.shape[0], dtype=weight.dtype))
        layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        layer.forward = _Cast(layer)


@dataclass(frozen=True)
class _Cast:
    layer: Any

    def __call__(self, x: Any) -> Any:
        layer = self.layer
        y = torch.mm(x.reshape(-1, x.shape[-1]), layer.weight.t().to(x.dtype))
        y = (y * layer.scale).reshape(*x.shape[:-1], -1)
        if layer.bias is not None:
            y += layer.bias
        return y


def sliced(vae: Any, tiles: int, latents: tuple[int, int], downscale: int) -> LatentCodec:
    """The codec, one picture at a time, each in ``tiles`` x ``tiles`` tiles (with what they overlap)."""
    vae.enable_slicing()
    if tiles > 1:
        vae.enable_tiling()
        side = -(-max(latents) // tiles)
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, side * downscale
    return LatentCodec(vae)


def window_side(outline: Outline, latents: tuple[int, int]) -> int:
    """Positions along a side of the table that are kept: an even number fewer than there are, so that what is
    cut out of their middle is what would be cut out of the whole table's."""
    most = int(outline.configs["transformer"]["pos_embed_max_size"])
    side = max(latents) // outline.patch
    return min(side + (most - side) % 2, most)


def _modulates(name: str) -> bool:
    return name.startswith("time_text_embed.") or (".linear." in name and "norm" in name)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
