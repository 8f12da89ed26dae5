"""The adversarial loss in latent space: heads on a net's features tell the student's samples from the
teacher's.

LADD (Sauer et al., arXiv 2403.12015) taps the frozen teacher, SD3.5-Flash (arXiv 2509.21318) the proxy, and
renews every head now and then so that none overfits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.rollout import Rollout
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

Judged = Literal["finals", "last", "estimates"]
"""What of the student is judged: the end of its walk with the gradient of every step, the same with that of
the last step alone, or the clean estimate of a random step."""


@dataclass(frozen=True)
class AdversarialLoss:
    """The losses of heads and student, for a method to put in turns.

    Attributes:
        taps: features of the teacher or the proxy.
        heads: what judges them.
        disc_input: what of the student is judged.
        density: times to which both sides are noised before they are judged.
        kind: ``softplus`` or ``hinge``.
        weight: of the student's loss.
        smooth: weight of the heads' own regularisation: judgements of a real sample shall not change when a
            little noise is added to it, a gradient penalty without its second derivative (Lin et al.,
            arXiv 2501.08316, equation 6).
        renewal: probability that a head is begun anew after a step.
    """

    taps: FeatureTaps
    heads: DiscriminatorHeads
    disc_input: Judged = "finals"
    density: schedule.Density = schedule.uniform
    kind: Literal["softplus", "hinge"] = "softplus"
    weight: float = 1.0
    smooth: float = 1.0
    renewal: float = 0.005

    def discriminator_loss(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        """The heads' loss: ``batch.latents`` are the teacher's samples."""
        import torch

        real, fake = batch.latents, rollout.finals(batch, draw)
        if self.disc_input == "estimates":
            with torch.no_grad():
                fake = rollout.move(batch, draw, rollout.pick(draw)).x0
        t, noise = draw.times(self.density, real), draw.noise(real)
        with torch.no_grad():
            features = [self.taps(flow.interpolate(x, noise, t), t, batch.cond) for x in (real, fake)]
            near = self.taps(flow.interpolate(real + 0.05 * draw.noise(real), noise, t), t, batch.cond)
        told, taken = (self.heads(x) for x in features)
        apart = (self.heads(near) - told).square().mean()
        return {
            "heads": losses.discriminator(told, taken, self.kind),
            "smooth": self.smooth * apart,
            "heads/right": 0.5 * ((told > 0).float().mean() + (taken < 0).float().mean()).detach(),
        }

    def generator_loss(self, rollout: Rollout, batch: Batch, draw: StepRandom) -> Losses:
        """The student's loss."""
        if self.disc_input == "finals":
            x0 = rollout.whole(batch, draw)
        else:
            last = self.disc_input == "last"
            index = rollout.steps - 1 if last else rollout.pick(draw)
            x0 = rollout.move(batch, draw, index).x0
        t, noise = draw.times(self.density, x0), draw.noise(x0)
        features = self.taps(flow.interpolate(x0, noise, t), t, batch.cond)
        fooled = self.weight * losses.generator(self.heads(features), self.kind)
        return {"adversarial": fooled, **rollout.figures(batch, draw)}

    def renew(self, draw: StepRandom) -> Sequence[Any]:
        """Begin heads anew by chance; their parameters."""
        fresh = [i for i in range(len(self.heads.heads)) if draw.rng.random() < self.renewal]
        return [p for i in fresh for p in self.heads.reset_head(i, draw.torch)]


@dataclass(frozen=True)
class LADD:
    """The adversarial loss alone, as in LADD.

    Attributes:
        student: the module that learns, a few-step net.
        velocity: the same as a velocity.
        critic: the losses.
        grid: the student's times.
    """

    student: Any
    velocity: Velocity
    critic: AdversarialLoss
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Any]:
        return {"student": self.student, "heads": self.critic.heads}

    def turns(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        return [
            Update("heads", partial(self.critic.discriminator_loss, rollout)),
            Update("student", partial(self.critic.generator_loss, rollout)),
            InPlaceUpdate("heads", self.critic.renew),
        ]
