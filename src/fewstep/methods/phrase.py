"""Text encoders that understand more, for a net that need not learn anew (floor 3).

A net was trained on what its encoders say of plain prompts. Whatever else means the same shall make them say
the same: the states that foretell the picture, and the pooled ones, of the plain prompt. States of the single
words cannot agree, for the words differ; they keep, on captions of the data set, what they were. What no
distance of states tells is how much of it shows: so a share of the rows goes through the net itself, and its
velocity shall be the one that the plain prompt gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.methods import Draw, Losses, Turn
from fewstep.types import Cond


@dataclass(frozen=True)
class PhraseBatch:
    """Token ids int64 ``[B, L]`` of what is said and of what is meant: first phrases, then captions as they
    are.

    Attributes:
        said: ids.
        meant: ids; of a caption its own.
        phrases: how many of the rows are phrases.
    """

    said: Any
    meant: Any
    phrases: int


@dataclass(frozen=True)
class Rephrase:
    """Minimise the squared distance to what the encoders said of the plain prompt before, over its variance.

    Attributes:
        student: ids ``[B, L]`` -> states ``[B, L, D]`` and pooled ``[B, P]``.
        before: the same of the encoders as they were; it does not learn.
        cells: how many of the last positions foretell the picture.
        heard: states and pooled -> what the net makes of each before its first block.
        velocity: of the net; it does not learn.
        latent: ``(C, H, W)``.
        times: where velocities are compared, from the sampling grid, the first of them 1.
        every: of so many phrases, and of so many captions, one goes through the net.
        kept: weight of captions: little is lost in a picture before it can no longer be told from others.
    """

    student: Any
    before: Any
    cells: int
    heard: Callable[[Any, Any], tuple[Any, Any]]
    velocity: Any
    latent: tuple[int, int, int]
    times: Sequence[float]
    every: int
    kept: float

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.losses)]

    def losses(self, batch: PhraseBatch, draw: Draw) -> Losses:
        """Of phrases and of captions: the distance of what the net hears, and of what it draws."""
        import torch

        with torch.no_grad():
            meant = Cond(*self.before(batch.meant))
            wanted = self.heard(meant.context, meant.pooled)
        said = Cond(*self.student(batch.said))
        own = self.heard(said.context, said.pooled)
        n, c = batch.phrases, self.cells
        phrases, captions = range(0, n, self.every), range(n, len(batch.said), self.every)
        drawn = self._drawn(said, meant, [*phrases, *captions], draw)
        return {
            "phrase": _off(own[0][:n, -c:], wanted[0][:n, -c:]) + _off(own[1][:n], wanted[1][:n]),
            "caption": self.kept * (_off(own[0][n:], wanted[0][n:]) + _off(own[1][n:], wanted[1][n:])),
            "drawn_phrase": drawn[: len(phrases)].mean(),
            "drawn_caption": self.kept * drawn[len(phrases) :].mean(),
        }

    def _drawn(self, said: Cond, meant: Cond, rows: Sequence[int], draw: Draw) -> Any:
        """Squared distance of velocities over the variance of the pictures, ``[B]``.

        The picture that a velocity at time 1 foretells stands in for the data: ``x_t`` is made of it.
        """
        import torch

        said, meant = (Cond(c.context[rows], c.pooled[rows]) for c in (said, meant))
        with torch.no_grad():
            noise = draw.noise(torch.empty(len(rows), *self.latent, device=said.context.device))
            start = torch.ones(len(rows), device=noise.device)
            pictures = noise - self.velocity(noise, start, meant)
            t = torch.tensor(self.times, dtype=torch.float32, device=noise.device)[
                draw.choices(range(len(self.times)), start)
            ]
            x_t = torch.lerp(pictures, noise, t[:, None, None, None])
            wanted = self.velocity(x_t, t, meant)
        off = (self.velocity(x_t, t, said) - wanted).square().mean((1, 2, 3))
        return off / pictures.var(0).mean()


def _off(own: Any, wanted: Any) -> Any:
    return (own - wanted).square().mean() / wanted.var()
