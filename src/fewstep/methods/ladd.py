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
from fewstep.methods.anchor import anchored
from fewstep.methods.base import InPlaceUpdate, Losses, StepRandom, Update
from fewstep.methods.rollout import Rollout
from fewstep.modules.discriminator import DiscriminatorHeads, FeatureTaps

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

DiscriminatorInput = Literal["finals", "last", "estimates", "noised-data"]
"""Input of the heads from the student.

``finals``: its sample, with the gradient of every step. ``last``: the same with that of the last step alone.
``estimates``: the clean estimate at a random step of its trajectory. ``noised-data``: the clean estimate from
a teacher's sample that was noised to a random time of the grid, as in LADD (section 3).
"""


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

        real, fake = batch.latents, self._fake(rollout, batch, random)
        t, noise = random.times(self.density, real), random.noise(real)
        near = real + 0.05 * random.noise(real)
        with torch.no_grad():
            features = [self.taps(flow.interpolate(x, noise, t), t, batch.cond) for x in (real, fake, near)]
        real_logits, fake_logits, near_logits = (self.heads(x, real.shape[2:]) for x in features)
        accuracy = 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean())
        return {
            "heads": losses.discriminator(real_logits, fake_logits, self.kind),
            "smooth": self.smooth * (near_logits - real_logits).square().mean(),
            "heads/right": accuracy.detach(),
        }

    def backbone_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Tensor:
        """Return the heads' loss with a gradient for the net whose features they read.

        DMD2 (arXiv 2405.14867, section 4.3) trains the proxy by it, besides the heads. The samples get no
        gradient.
        """
        real, fake = batch.latents, self._fake(rollout, batch, random)
        t, noise = random.times(self.density, real), random.noise(real)
        features = (self.taps(flow.interpolate(x, noise, t), t, batch.cond) for x in (real, fake))
        real_logits, fake_logits = (self.heads(x, real.shape[2:]) for x in features)
        return losses.discriminator(real_logits, fake_logits, self.kind)

    def _fake(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Tensor:
        """Return what the heads see of the student, without gradient."""
        import torch

        with torch.no_grad():
            if self.disc_input == "noised-data":
                return estimate_from_data(rollout, batch, random)
            if self.disc_input == "estimates":
                return rollout.simulated_step(batch, random, rollout.pick(random)).x0
            return rollout.finals(batch, random)

    def generator_loss(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Losses:
        """Return the student's loss."""
        x0 = self._judged(rollout, batch, random)
        t, noise = random.times(self.density, x0), random.noise(x0)
        features = self.taps(flow.interpolate(x0, noise, t), t, batch.cond)
        loss = self.weight * losses.generator(self.heads(features, x0.shape[2:]), self.kind)
        if self.disc_input == "noised-data":  # no trajectory is simulated
            drawn = x0.detach()
            figures: Losses = {"latent/mean": drawn.mean(), "latent/std": drawn.std()}
        else:
            figures = rollout.figures(batch, random)
        if rollout.steps == 1:
            # One step of the teacher draws a mean. Its spread is no reference for the divergence monitor.
            figures = {name: value for name, value in figures.items() if name != "latent/std"}
        return {"adversarial": loss, **figures}

    def _judged(self, rollout: Rollout, batch: Batch, random: StepRandom) -> Tensor:
        """Return what the heads see of the student, with its gradient, ``[B, C, H, W]``."""
        if self.disc_input == "noised-data":
            return estimate_from_data(rollout, batch, random)
        if self.disc_input == "finals":
            return rollout.finals_with_grad(batch, random)
        index = rollout.steps - 1 if self.disc_input == "last" else rollout.pick(random)
        return rollout.step(batch, random, index).x0

    def reset_heads(self, random: StepRandom) -> Sequence[Parameter]:
        """Reset heads at random and return their parameters."""
        chosen = [i for i in range(len(self.heads.heads)) if random.rng.random() < self.reset_probability]
        return [p for i in chosen for p in self.heads.reset_head(i, random.torch)]


def estimate_from_data(rollout: Rollout, batch: Batch, random: StepRandom) -> Tensor:
    """Return the student's clean estimates from the teacher's samples, noised to times of its grid.

    LADD, section 3. The trained steps' start times are equally likely, where LADD comes to prefer pure noise.

    Returns:
        ``[B, C, H, W]``, with the student's gradient.
    """
    import torch

    x0 = batch.latents
    index = random.choices(rollout.trained_steps or range(rollout.steps), x0)
    t = torch.tensor(list(rollout.grid)).to(x0.device)[index]
    x = flow.interpolate(x0, random.noise(x0), t)
    return flow.to_x0(x, rollout.velocity(x, t, batch.student_cond), t)


@dataclass(frozen=True)
class LADD:
    """The adversarial loss alone, as in LADD.

    Attributes:
        student: the few-step net.
        velocity: the student as a velocity.
        adversarial: the losses.
        grid: the student's times.
        heads_updates: updates of the heads before each of the student's.
        trajectory_weight: weight of trajectory guidance; above 0 the batch must carry trajectories.
    """

    student: Module
    velocity: Velocity
    adversarial: AdversarialLoss
    grid: Sequence[float]
    heads_updates: int = 1
    trajectory_weight: float = 0.0

    @property
    def nets(self) -> dict[str, Module]:
        return {"student": self.student, "heads": self.adversarial.heads}

    def updates(self, step: int) -> Sequence[Update | InPlaceUpdate]:
        rollout = Rollout(self.velocity, self.grid)
        student = Update("student", partial(self.adversarial.generator_loss, rollout))
        return [
            *[Update("heads", partial(self.adversarial.discriminator_loss, rollout))] * self.heads_updates,
            anchored(student, self.velocity, self.grid, self.trajectory_weight),
            InPlaceUpdate("heads", self.adversarial.reset_heads),
        ]
