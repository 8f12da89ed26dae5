"""The adversarial loss in latent space: heads on a net's features separate the student's samples from the
teacher's.

LADD (Sauer et al., arXiv 2403.12015) reads features of the frozen teacher, SD3.5-Flash (arXiv 2509.21318)
those of the proxy. SD3.5-Flash also resets a head at random so that none overfits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from fewstep.core import flow, losses, schedule
from fewstep.core.types import Batch, Velocity
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.rollout import Rollout
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

DiscriminatorInput = Literal["finals", "last", "estimates"]
"""Input of the heads from the student: its sample with the gradient of every step, the same with that of
the last step alone, or the clean estimate at a random step."""


@dataclass(frozen=True)
class AdversarialLoss:
    """The losses of the discriminator heads and of the student.

    Attributes:
        taps: features of the teacher or the proxy.
        heads: the discriminator heads on them.
        disc_input: what of the student the heads see.
        density: of the times to which both sides are noised before the heads see them.
        kind: ``softplus`` or ``hinge``.
        weight: of the student's loss.
        smooth: weight of the heads' regularisation: the output for a real sample may not change when a little
            noise is added, a gradient penalty without second derivatives (Lin et al., arXiv 2501.08316,
            equation 6).
        reset_probability: of each head, per training step.
    """

    taps: FeatureTaps
    heads: DiscriminatorHeads
    disc_input: DiscriminatorInput = "finals"
    density: schedule.Density = schedule.uniform
    kind: Literal["softplus", "hinge"] = "softplus"
    weight: float = 1.0
    smooth: float = 1.0
    reset_probability: float = 0.005

    def discriminator_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the heads' loss; ``batch.latents`` are the teacher's samples."""
        import torch

        real, fake = batch.latents, rollout.finals(batch, random)
        if self.disc_input == "estimates":
            with torch.no_grad():
                fake = rollout.step(batch, random, rollout.pick(random)).x0
        t, noise = random.times(self.density, real), random.noise(real)
        with torch.no_grad():
            features = [self.taps(flow.interpolate(x, noise, t), t, batch.cond) for x in (real, fake)]
            near = self.taps(flow.interpolate(real + 0.05 * random.noise(real), noise, t), t, batch.cond)
        real_logits, fake_logits = (self.heads(x) for x in features)
        difference = (self.heads(near) - real_logits).square().mean()
        accuracy = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        return {
            "heads": losses.discriminator(real_logits, fake_logits, self.kind),
            "smooth": self.smooth * difference,
            "heads/right": accuracy.detach(),
        }

    def generator_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the student's loss."""
        if self.disc_input == "finals":
            x0 = rollout.finals_with_grad(batch, random)
        else:
            last = self.disc_input == "last"
            index = rollout.steps - 1 if last else rollout.pick(random)
            x0 = rollout.step(batch, random, index).x0
        t, noise = random.times(self.density, x0), random.noise(x0)
        features = self.taps(flow.interpolate(x0, noise, t), t, batch.cond)
        loss = self.weight * losses.generator(self.heads(features), self.kind)
        return {"adversarial": loss, **rollout.figures(batch, random)}

    def reset_heads(self, random: StepRandom) -> Sequence[Parameter]:
        """Reset heads at random and return their parameters."""
        chosen = [i for i in range(len(self.heads.heads)) if random.rng.random() < self.reset_probability]
        return [p for i in chosen for p in self.heads.reset_head(i, random.torch)]


@dataclass(frozen=True)
class LADD:
    """The adversarial loss alone, as in LADD.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        adversarial: the losses.
        grid: the student's times.
    """

    student: Module
    velocity: Velocity
    adversarial: AdversarialLoss
    grid: Sequence[float]

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, "heads": self.adversarial.heads}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        return [
            Update("heads", partial(self.adversarial.discriminator_loss, rollout)),
            Update("student", partial(self.adversarial.generator_loss, rollout)),
            InPlaceUpdate("heads", self.adversarial.reset_heads),
        ]
