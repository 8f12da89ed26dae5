"""Checks of the options that several methods have."""

from __future__ import annotations

from math import isfinite

from fewstep.core.types import UserError
from fewstep.core.validate import require_fraction, require_positive
from fewstep.distill.config import DistillConfig


def refuse_teacher_guidance(config: DistillConfig, method: str) -> None:
    """Refuse a guidance scale of the losses for a method whose losses have no guided teacher.

    Raises:
        UserError: there is one.
    """
    if config.teacher_guidance is not None:
        raise UserError(f"--teacher-guidance has no effect: {method} asks no guided teacher")


def check_options(
    config: DistillConfig,
    *,
    proxy_updates: int = 1,
    ida_decay: float = 1.0,
    proxy_lr: float | None = None,
    heads_lr: float = 1.0,
    gan_weight: float = 0.0,
    trajectory_weight: float = 0.0,
) -> None:
    """Refuse options that are out of their ranges, before anything is loaded or trained.

    Raises:
        UserError: an option is out of its range.
    """
    require_positive(proxy_updates=proxy_updates)
    require_fraction(ida_decay=ida_decay)
    for name, rate in (("proxy-lr", 1.0 if proxy_lr is None else proxy_lr), ("heads-lr", heads_lr)):
        if not (isfinite(rate) and rate > 0):
            raise UserError(f"--{name} must be a positive number, not {rate}")
    for name, value in (("gan-weight", gan_weight), ("trajectory-weight", trajectory_weight)):
        if not (isfinite(value) and value >= 0):
            raise UserError(f"--{name} must be a number of at least 0, not {value}")
