"""A bundle as a :class:`fewstep.core.types.Model`: its engine runs text encoders, net and autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.core.cpu import cores
from fewstep.core.types import Array, Cond, Model, Step, UserError
from fewstep.runtime.bundle import T5_TOKENIZER, Bundle
from fewstep.runtime.session import Session
from fewstep.runtime.tokenizer import Tokens, normalize_text


@dataclass(frozen=True)
class Text:
    """The text encoders: both CLIPs and, where it is there, T5."""

    tokens: Tokens
    graph: Session
    t5: tuple[Tokens, Session] | None = None

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """``B`` prompts -> context ``[B, L, D]``, T5's rows last, and pooled ``[B, P]``, float32."""
        lines = [normalize_text(prompt) for prompt in prompts]
        found = self.graph(tokens=self.tokens(lines))
        if len(found) != 2:
            raise UserError(f"{self.graph.path} does not fit its bundle: it gives {len(found)} arrays, not 2")
        context = _shaped(self.graph, found[0], (len(lines), self.tokens.length, None))
        pooled = _shaped(self.graph, found[1], (len(lines), None))
        if self.t5 is not None:
            tokens, graph = self.t5
            shape = (len(lines), tokens.length, context.shape[2])
            more = _shaped(graph, graph(tokens=tokens(lines))[0], shape)
            context = np.concatenate([context, more], axis=1)
        return Cond(context, pooled)


@dataclass(frozen=True)
class Net:
    """The transformer: a velocity whose modulations are made for all steps of a walk at once."""

    modulation: Session
    graph: Session

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> velocity ``[B, C, H, W]``, float32."""
        return self._step(cond, self._modulations(t, cond.pooled))(x_t)

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """A step for each of ``times``."""
        pooled = np.concatenate([cond.pooled] * len(times))
        made = self._modulations(np.repeat(np.asarray(times), len(cond)), pooled)
        return [self._step(cond, part) for part in np.split(made, len(times))]

    def _modulations(self, t: Array, pooled: Array) -> np.ndarray:
        made = self.modulation(t=np.asarray(t, np.float32), pooled=np.asarray(pooled, np.float32))[0]
        return _shaped(self.modulation, made, (len(t), None))

    def _step(self, cond: Cond, modulation: np.ndarray) -> Step:
        context = np.asarray(cond.context, np.float32)

        def step(x: Array) -> Array:
            made = self.graph(x=np.asarray(x, np.float32), context=context, modulation=modulation)[0]
            return _shaped(self.graph, made, x.shape)

        return step


class Autoencoder:
    """The codec; its encoder is loaded when it is first used."""

    def __init__(self, bundle: Bundle, decoder: Session) -> None:
        self._bundle = bundle
        self._decoder = decoder
        self._encoder: Session | None = None

    def encode(self, images: Array) -> Array:
        """Images ``[B, 3, h, w]`` in [-1, 1] -> latents ``[B, C, H, W]``.

        Raises:
            UserError: the bundle has no encoder.
        """
        if self._encoder is None:
            self._encoder = _graph(self._bundle, "encoder", self._decoder.threads)
        latents = self._encoder(images=np.asarray(images, np.float32))[0]
        return _shaped(self._encoder, latents, (len(images), *self._bundle.latent))

    def decode(self, latents: Array) -> Array:
        """Latents ``[B, C, H, W]`` -> images ``[B, 3, h, w]``, about [-1, 1]."""
        images = self._decoder(latents=np.asarray(latents, np.float32))[0]
        _, *sides = self._bundle.latent
        return _shaped(self._decoder, images, (len(latents), 3, *(self._bundle.downscale * n for n in sides)))


def _shaped(graph: Session, array: np.ndarray, shape: Sequence[int | None]) -> np.ndarray:
    """What a graph gave, if it has this shape; ``None`` is a side of any length.

    Raises:
        UserError: it has another.
    """
    fits = array.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits:
        told = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(f"{graph.path} does not fit its bundle: it gives {array.shape}, not ({told})")
    return array


def open_bundle(bundle: Bundle, threads: int | None = None) -> Model:
    """Load a bundle for generation.

    The graphs that every picture needs are loaded in the background while this function hashes
    the files, so a damaged file is found here and costs no time.

    Args:
        bundle: what ``bundle.read`` gave.
        threads: threads inside one operator; all cores when ``None``.

    Raises:
        UserError: a file is damaged.
        ImportError: the bundle's engine is not installed.
    """
    threads = threads or cores()
    stems = ("transformer", "text", "modulation", "decoder")  # the net first, for it takes longest
    try:
        net, text, modulation, decoder = (_graph(bundle, stem, threads).start() for stem in stems)
    finally:
        bundle.verify()  # a file that is damaged is called so, whatever else its graph was found to be
    tokens, t5 = Tokens(bundle.path("tokenizer.json"), bundle.length), None
    if bundle.t5_length:
        t5_tokens = Tokens(bundle.path(T5_TOKENIZER), bundle.t5_length, warns=False)
        t5 = (t5_tokens, _graph(bundle, "t5", threads).start())
    return Model(
        name=bundle.name,
        velocity=Net(modulation, net),
        text=Text(tokens, text, t5),
        codec=Autoencoder(bundle, decoder),
        latent=bundle.latent,
        downscale=bundle.downscale,
        shift=bundle.shift,
        steps=bundle.steps,
        guidance=bundle.guidance,
        sampler=bundle.sampler,
    )


def _graph(bundle: Bundle, stem: str, threads: int) -> Session:
    """A graph of the bundle on its engine, which is not loaded before it is needed.

    Raises:
        UserError: the bundle has no such graph.
        ImportError: its engine is not installed.
    """
    path = bundle.graph(stem)
    if bundle.engine == "openvino":
        from fewstep.runtime import openvino

        return openvino.Graph(path, threads, openvino.compute_dtype(stem, bundle.compute))
    if bundle.engine == "executorch":
        from fewstep.runtime import executorch

        return executorch.Graph(path, threads)
    from fewstep.runtime import ort

    return ort.Graph(path, threads, convolutions=stem in ("decoder", "encoder"))
