"""Losses: pure functions from arrays to a scalar; nothing here steps, logs or owns a net."""

from __future__ import annotations

from fewstep.core.flow import expand
from fewstep.core.types import Array


def _mean_square(error: Array) -> Array:
    """Mean over each sample of ``[B, ...]``, then over the samples."""
    return (error * error).reshape(error.shape[0], -1).mean(1).mean()


def flow_matching(v_pred: Array, noise: Array, x0: Array) -> Array:
    """``|| v - (eps - x_0) ||^2`` (Lipman et al., arXiv 2210.02747, for the straight path).

    Args:
        v_pred: the net's velocity at ``mix(x0, noise, t)``, ``[B, C, H, W]``.
        noise: ``eps``, ``[B, C, H, W]``.
        x0: the data, ``[B, C, H, W]``.
    """
    return _mean_square(v_pred - (noise - x0))


def trajectory(v_pred: Array, x_t: Array, x_next: Array, t: Array, t_next: Array) -> Array:
    """``|| v - (x_next - x_t) / (t_next - t) ||^2``: one step does what the teacher did in many.

    Trajectory guidance of SD3.5-Flash (arXiv 2509.21318).

    Args:
        v_pred: the student's velocity at ``(x_t, t)``, ``[B, C, H, W]``.
        x_t: start of the teacher's trajectory, ``[B, C, H, W]``.
        x_next: where it arrived at ``t_next``, ``[B, C, H, W]``.
        t: start times, a float or ``[B]``.
        t_next: arrival times, a float or ``[B]``; different from ``t``.
    """
    return _mean_square(v_pred - (x_next - x_t) / (expand(t_next, x_t) - expand(t, x_t)))


def distribution_matching(x: Array, x0_proxy: Array, x0_teacher: Array, x0_student: Array) -> Array:
    """``1/2 || x - sg[x - g] ||^2`` with ``g = (x0_proxy - x0_teacher) / mean |x0_student - x0_teacher|``.

    Its gradient is ``g``: the difference of two scores, the proxy's (what the student draws) and the
    teacher's (what it shall draw), in terms of ``x_0`` (DMD, Yin et al., arXiv 2311.18828, equation 7 and
    algorithm 2, whose weight is ``1 / (1 - t)`` of equation 8's). ``x`` is what moves, a sample of the
    student or a point on its path.

    Args:
        x: ``[B, ...]``, with the student's gradient.
        x0_proxy: the proxy's clean estimate where the scores are taken, ``[B, ...]``.
        x0_teacher: the guided teacher's there.
        x0_student: what the student meant, for the size of a sample's error; its mean is a sample's own.
    """
    apart = (x0_student.detach() - x0_teacher.detach()).abs()
    size = apart.reshape(len(x), -1).mean(1).reshape((-1,) + (1,) * (x.ndim - 1))
    g = (x0_proxy.detach() - x0_teacher.detach()) / (size + 1e-6)
    return 0.5 * _mean_square(x - (x - g).detach())


def generator(fake: Array, kind: str = "softplus") -> Array:
    """Return the student's adversarial loss: ``softplus(-d)`` (non-saturating) or ``-d`` (hinge).

    Goodfellow et al., arXiv 1406.2661; Lim and Ye, arXiv 1705.02894.

    Args:
        fake: logits of the student's samples, any shape; larger is more real.
        kind: ``softplus`` or ``hinge``.
    """
    from torch.nn.functional import softplus

    return -fake.mean() if kind == "hinge" else softplus(-fake).mean()


def discriminator(real: Array, fake: Array, kind: str = "softplus") -> Array:
    """Return the loss of the discriminator heads; arguments as in :func:`generator`."""
    from torch.nn.functional import relu, softplus

    if kind == "hinge":
        return relu(1 - real).mean() + relu(1 + fake).mean()
    return softplus(-real).mean() + softplus(fake).mean()
