"""Types that all packages share: models, velocities, conditions, batches. No heavy imports.

Everywhere ``t = 0`` is data, ``t = 1`` is noise, ``x_t = (1 - t) x_0 + t eps``, and nets predict the velocity
``v = eps - x_0``. Arrays are numpy arrays or torch tensors. Arithmetic on them is written once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


Array = Any
"""A numpy array or a torch tensor; both are accepted wherever this name stands."""


class UserError(Exception):
    """Bad input: the message is one line that says what was wrong and what to do.

    The command line prints it as ``fewstep: MESSAGE`` and exits with status 2.
    """


@dataclass(frozen=True)
class Cond:
    """The conditions of a velocity.

    Attributes:
        context: token embeddings, ``[B, L, D]``, float32.
        pooled: one embedding per prompt, ``[B, P]``, float32.
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
        prompts: the captions as text, for logs and metrics.
        trajectory: the teacher's sampling trajectories to ``latents`` at the times of the student's grid,
            noise first and ``latents`` last, ``[B, S + 1, C, H, W]``; ``None`` if the samples have none.
        cond_without_t5: the student's conditions without T5; ``None`` if the student has the teacher's.
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
    """Part ``part`` of ``parts`` of every batch: that of a process or a micro-batch."""

    part: int = 0
    parts: int = 1

    def slice_of(self, batch: int) -> slice:
        """Return the rows of this part in a batch of ``batch`` samples.

        Raises:
            UserError: the batch cannot be cut into equal parts.
        """
        if batch % self.parts:
            many = f"{self.parts} equal parts, one per process and micro-batch"
            raise UserError(f"a batch of {batch} cannot be cut into {many}")
        rows = batch // self.parts
        return slice(self.part * rows, (self.part + 1) * rows)


WHOLE = BatchSlice()
"""The whole batch in one piece."""


@runtime_checkable
class Velocity(Protocol):
    """A velocity field: teacher, student, proxy, guided net or exported graph."""

    def __call__(self, x_t: Array, t: Array, cond: Cond) -> Array:
        """``x_t [B, C, H, W]``, ``t [B]`` in [0, 1] float32 -> velocity ``[B, C, H, W]``."""
        ...


Step = Callable[[Array], Array]
"""``x_t [B, C, H, W]`` -> velocity, at a fixed time and for fixed conditions."""


@runtime_checkable
class PreparableVelocity(Velocity, Protocol):
    """A velocity that computes in advance, for all steps at once, what does not depend on the latents."""

    def steps(self, times: Sequence[float], cond: Cond) -> Sequence[Step]:
        """Return a step for each of ``times``, for the ``B`` samples of ``cond``."""
        ...


Sampler = Literal["euler", "renoise"]
"""The solver step: along the velocity, or an estimate of the data that is mixed with fresh noise."""


class TextEncoder(Protocol):
    """Encodes prompts."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...


@runtime_checkable
class PrefetchingTextEncoder(TextEncoder, Protocol):
    """A text encoder that encodes all prompts of a call in advance, while the net is not in memory."""

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts and keep their embeddings."""
        ...

    def clear_cache(self) -> None:
        """Drop the embeddings that are kept."""
        ...


class Codec(Protocol):
    """Encodes pixels to latents and decodes them."""

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
    """All parts that generation needs, on any runtime.

    Attributes:
        name: the model's name.
        velocity: the net.
        text: the text encoders.
        codec: the autoencoder.
        latent: default latent shape ``(C, H, W)``.
        downscale: pixels per latent cell along a side.
        shift: time shift ``s`` of the sampling grid.
        steps: default number of steps.
        guidance: default guidance scale; ``None`` if guidance is distilled into the net.
        embedded_guidance: default scale of a net with embedded guidance, whose velocity has
            ``with_guidance(scale)``; ``None`` for other nets.
        sampler: the solver step (:func:`fewstep.core.sampling.step_rule`).
        from_numpy: numpy float32 array -> the array kind of the parts.
        to_numpy: an array of that kind -> numpy float32.
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
    from_numpy: Callable[[np.ndarray], Array] = _same
    to_numpy: Callable[[Array], np.ndarray] = _same
