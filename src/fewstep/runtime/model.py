"""A bundle as a :class:`fewstep.core.types.Model`, whose graphs run on the bundle's engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.core.cpu import cores
from fewstep.core.types import Array, Cond, Model, Step, UserError
from fewstep.runtime.bundle import T5_TOKENIZER, Bundle
from fewstep.runtime.engine import RuntimeEngine, built_in
from fewstep.runtime.session import Session
from fewstep.runtime.tokenizer import Tokens, normalize_text


@dataclass(frozen=True)
class Text:
    """The text encoders: both CLIPs and, if the bundle has it, T5."""

    tokens: Tokens
    graph: Session
    t5: tuple[Tokens, Session] | None = None

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Encode ``B`` prompts to context ``[B, L, D]``, T5's rows last, and pooled ``[B, P]``, float32."""
        lines = [normalize_text(prompt) for prompt in prompts]
        outputs = self.graph(tokens=self.tokens(lines))
        if len(outputs) != 2:
            raise UserError(
                f"{self.graph.path} does not fit its bundle: it gives {len(outputs)} arrays, not 2"
            )
        context = _shaped(self.graph, outputs[0], (len(lines), self.tokens.length, None))
        pooled = _shaped(self.graph, outputs[1], (len(lines), None))
        if self.t5 is not None:
            tokens, graph = self.t5
            shape = (len(lines), tokens.length, context.shape[2])
            more = _shaped(graph, graph(tokens=tokens(lines))[0], shape)
            context = np.concatenate([context, more], axis=1)
        return Cond(context, pooled)


@dataclass(frozen=True)
class Net:
    """The transformer: a velocity whose modulations are computed for all steps in one call."""

    modulation: Session
    graph: Session

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` -> velocity ``[B, C, H, W]``, float32."""
        return self._step(cond, self._modulations(t, cond.pooled))(x_t)

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """Return a step for each of ``times``."""
        pooled = np.concatenate([cond.pooled] * len(times))
        modulations = self._modulations(np.repeat(np.asarray(times), len(cond)), pooled)
        return [self._step(cond, part) for part in np.split(modulations, len(times))]

    def _modulations(self, t: Array, pooled: Array) -> np.ndarray:
        output = self.modulation(t=np.asarray(t, np.float32), pooled=np.asarray(pooled, np.float32))[0]
        return _shaped(self.modulation, output, (len(t), None))

    def _step(self, cond: Cond, modulation: np.ndarray) -> Step:
        context = np.asarray(cond.context, np.float32)

        def step(x: Array) -> Array:
            velocity = self.graph(x=np.asarray(x, np.float32), context=context, modulation=modulation)[0]
            return _shaped(self.graph, velocity, x.shape)

        return step


class Autoencoder:
    """The codec. Its encoder is loaded at its first use."""

    def __init__(self, bundle: Bundle, engine: RuntimeEngine, decoder: Session) -> None:
        self._bundle = bundle
        self._engine = engine
        self._decoder = decoder
        self._encoder: Session | None = None

    def encode(self, images: Array) -> Array:
        """Encode images ``[B, 3, h, w]`` in [-1, 1] to latents ``[B, C, H, W]``.

        Raises:
            UserError: the bundle has no encoder.
        """
        if self._encoder is None:
            self._encoder = self._engine.open_graph(self._bundle, "encoder", self._decoder.threads)
        latents = self._encoder(images=np.asarray(images, np.float32))[0]
        return _shaped(self._encoder, latents, (len(images), *self._bundle.latent))

    def decode(self, latents: Array) -> Array:
        """Decode latents ``[B, C, H, W]`` to images ``[B, 3, h, w]``, about [-1, 1]."""
        images = self._decoder(latents=np.asarray(latents, np.float32))[0]
        _, *sides = self._bundle.latent
        return _shaped(self._decoder, images, (len(latents), 3, *(self._bundle.downscale * n for n in sides)))


def _shaped(graph: Session, array: np.ndarray, shape: Sequence[int | None]) -> np.ndarray:
    """Return the output of a graph if it has this shape; ``None`` is a side of any length.

    Raises:
        UserError: it has another shape.
    """
    fits = array.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(f"{graph.path} does not fit its bundle: it gives {array.shape}, not ({expected})")
    return array


def open_bundle(bundle: Bundle, threads: int | None = None, engine: RuntimeEngine | None = None) -> Model:
    """Load a bundle for generation.

    The graphs that every image needs are loaded in the background while this function hashes the files. So a
    damaged file is found here, and costs no time.

    Args:
        bundle: from :func:`fewstep.runtime.bundle.read`.
        threads: threads inside one operator; all cores by default.
        engine: opens the graphs; by default the engine of the bundle's kind.

    Raises:
        UserError: a file is damaged.
        ImportError: the library of the bundle's engine is not installed.
    """
    threads, engine = threads or cores(), engine or built_in(bundle)
    stems = ("transformer", "text", "modulation", "decoder")  # the net first, because it takes longest
    try:
        net, text, modulation, decoder = (engine.open_graph(bundle, stem, threads).start() for stem in stems)
    finally:
        bundle.verify()  # a damaged file is reported as damaged, whatever its graph raised
    tokens, t5 = Tokens(bundle.path("tokenizer.json"), bundle.length), None
    if bundle.t5_length:
        t5_tokens = Tokens(bundle.path(T5_TOKENIZER), bundle.t5_length, warns=False)
        t5 = (t5_tokens, engine.open_graph(bundle, "t5", threads).start())
    return Model(
        name=bundle.name,
        velocity=Net(modulation, net),
        text=Text(tokens, text, t5),
        codec=Autoencoder(bundle, engine, decoder),
        latent=bundle.latent,
        downscale=bundle.downscale,
        shift=bundle.shift,
        steps=bundle.steps,
        guidance=bundle.guidance,
        sampler=bundle.sampler,
    )
