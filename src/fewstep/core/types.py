"""The nouns of fewstep: what flows between the rooms (floor 0, no heavy imports).

Everywhere: ``t = 0`` is data, ``t = 1`` is noise, ``x_t = (1 - t) x_0 + t eps`` and nets speak the
velocity ``v = eps - x_0``. Arrays are numpy arrays or torch tensors; the arithmetic above them is
written once and only adds and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Array = Any
"""A numpy array or a torch tensor; both are accepted wherever this name stands."""


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what to do.

    The command line prints it as ``fewstep: MESSAGE`` and exits with status 2.
    """


@dataclass(frozen=True)
class Cond:
    """What a velocity is conditioned on.

    Attributes:
        context: token embeddings, ``[B, L, D]``, float32.
        pooled: one embedding a prompt, ``[B, P]``, float32.
    """

    context: Array
    pooled: Array

    def __len__(self) -> int:
        return int(self.context.shape[0])

    def __getitem__(self, rows: slice) -> Cond:
        return Cond(self.context[rows], self.pooled[rows])

    def map(self, function: Callable[[Array], Array]) -> Cond:
        """Apply ``function`` to both arrays (a cast, a device move, a repeat)."""
        return Cond(function(self.context), function(self.pooled))


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        latents: clean latents ``x_0``, ``[B, C, H, W]``.
        cond: the captions, encoded.
        prompts: the captions themselves, for logs and metrics.
        trajectory: the teacher's walks to ``latents`` at the times of the student's grid, noise first and
            ``latents`` last, ``[B, S + 1, C, H, W]``; ``None`` where nobody kept them.
        cond_without_t5: the captions as the student reads them, without the encoder that it learns to do
            without; ``None`` where it reads what the teacher reads.
    """

    latents: Array
    cond: Cond
    prompts: Sequence[str] = ()
    trajectory: Array | None = None
    cond_without_t5: Cond | None = None

    @property
    def student_cond(self) -> Cond:
        """The condition of the student."""
        return self.cond if self.cond_without_t5 is None else self.cond_without_t5


@dataclass(frozen=True)
class BatchSlice:
    """Part ``part`` of ``parts`` of every batch: a process's, or a micro-batch's."""

    part: int = 0
    parts: int = 1

    def slice_of(self, batch: int) -> slice:
        """The rows of this part in a batch of so many.

        Raises:
            UserError: the batch cannot be cut into equal parts.
        """
        if batch % self.parts:
            many = f"{self.parts} equal parts, one a process and micro-batch"
            raise UserError(f"a batch of {batch} cannot be cut into {many}")
        rows = batch // self.parts
        return slice(self.part * rows, (self.part + 1) * rows)


WHOLE = BatchSlice()
"""The whole batch in one piece."""


@runtime_checkable
class Velocity(Protocol):
    """Teacher, student, proxy, guided pair, branch pair or exported graph: all are this."""

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` in [0, 1] float32 -> velocity ``[B, C, H, W]``."""
        ...


Step = Callable[[Array], Array]
"""``x_t [B, C, H, W]`` -> velocity, at a time and for conditions that are settled."""


@runtime_checkable
class PreparableVelocity(Velocity, Protocol):
    """A velocity that does before a walk, for all its steps at once, what does not depend on the picture."""

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """A step for each of ``times``, for the ``B`` samples of ``cond``."""
        ...


Sampler = Literal["euler", "renoise"]
"""How a step is taken: along the velocity, or by estimating the data and mixing it with fresh noise."""


class TextEncoder(Protocol):
    """Prompts to their embeddings."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...


@runtime_checkable
class PrefetchingTextEncoder(TextEncoder, Protocol):
    """A text encoder that would rather read all prompts of a call before the net needs the room."""

    def prepare(self, prompts: Sequence[str]) -> None:
        """Read prompts, so that their embeddings are at hand."""
        ...


class Codec(Protocol):
    """Pixels to latents and back."""

    def encode(self, images: Array) -> Array:
        """``[B, 3, h, w]`` in [-1, 1] -> latents ``[B, C, H, W]``, scaled to about unit variance."""
        ...

    def decode(self, latents: Array) -> Array:
        """Latents ``[B, C, H, W]`` -> ``[B, 3, h, w]``, about [-1, 1], not clamped."""
        ...


def _same(array: Array) -> Array:
    return array


@dataclass(frozen=True)
class Model:
    """All that turning prompts into pictures needs, whatever runs it.

    Attributes:
        name: what the user calls it.
        velocity: the net.
        text: its text encoders.
        codec: its autoencoder.
        latent: default latent shape ``(C, H, W)``.
        downscale: pixels per latent cell along a side.
        shift: time shift ``s`` of its sampling grid.
        steps: default number of steps.
        guidance: default guidance scale; ``None`` when guidance is distilled into the net.
        embedded_guidance: default scale that a net with embedded guidance is given (its velocity then has
            ``with_guidance(scale)``); ``None`` for a net without.
        sampler: how its steps are taken (:func:`fewstep.core.sampling.step_rule`).
        from_numpy: numpy float32 array -> the array kind that the parts above take.
        to_numpy: the way back, to numpy float32.
    """

    name: str
    velocity: Velocity
    text: TextEncoder
    codec: Codec
    latent: tuple[int, int, int]
    downscale: int
    shift: float
    steps: int
    guidance: float | None = None
    embedded_guidance: float | None = None
    sampler: Sampler = "euler"
    from_numpy: Callable[[Any], Array] = _same
    to_numpy: Callable[[Array], Any] = _same
