"""Which schedulers of diffusers are followed, and what their settings mean.

Models here are sampled by Euler steps on an even, shifted grid, or by multistep consistency sampling on the
same grid. What a scheduler's configuration says beyond that is refused: it would draw another image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.core import json_io
from fewstep.core.types import UserError
from fewstep.core.validate import check_float

EULER = "FlowMatchEulerDiscreteScheduler"
CONSISTENCY = "FlowMatchLCMScheduler"
"""Its step is that of ``EULER`` with ``stochastic_sampling``: estimate x_0, then mix it with fresh noise."""

DEFAULTS: Mapping[str, object] = {
    "num_train_timesteps": 1000,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "scale_factors": None,
}
"""Settings that are followed at these values alone."""

WITHOUT_EFFECT = ("upscale_mode",)
"""Settings that say something only together with others that are refused."""


@dataclass(frozen=True)
class Schedule:
    """The settings that are followed, under diffusers' names and with its defaults.

    Attributes:
        shift: time shift of the grid.
        use_dynamic_shifting: take the shift from the number of tokens instead (:func:`schedule_shift`).
        base_shift: logarithm of the shift (or the shift itself) at ``base_image_seq_len`` tokens.
        max_shift: the same at ``max_image_seq_len`` tokens.
        base_image_seq_len: number of tokens.
        max_image_seq_len: number of tokens.
        time_shift_type: whether those are logarithms.
        stochastic_sampling: multistep consistency sampling instead of Euler steps.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def scheduler(self) -> Any:
        """The scheduler of diffusers with these settings."""
        import diffusers

        return getattr(diffusers, EULER)(**asdict(self))


def of(kind: str, config: Mapping[str, object], where: str) -> Schedule:
    """The schedule that a scheduler's configuration describes.

    Args:
        kind: name of the scheduler's class.
        config: its settings; keys that begin with an underscore say nothing.
        where: what to call it in errors.

    Raises:
        UserError: a class or a setting that is not followed, or a value of another type.
    """
    if kind not in (EULER, CONSISTENCY):
        raise UserError(
            f"{where} asks for the sampler {kind}, which is not followed: "
            f"give a scheduler folder of {EULER} (or {CONSISTENCY})"
        )
    said = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {field.name for field in fields(Schedule)}
    for key, value in said.items():
        unset = not value and key != "num_train_timesteps"
        if key in known or key in WITHOUT_EFFECT or unset or value == DEFAULTS.get(key):
            continue
        raise UserError(
            f"{where} sets {key} to {str(value)[:40]}, which is not followed: "
            "take it out if it is left over from another scheduler, or give another scheduler folder"
        )
    followed = json_io.convert({k: v for k, v in said.items() if k in known}, Schedule, where)
    if not followed.use_dynamic_shifting:
        check_float(f"{where}: shift", followed.shift, 1e-3, 1e3)
    elif followed.base_image_seq_len == followed.max_image_seq_len:
        raise UserError(f"{where}: base_image_seq_len and max_image_seq_len are the same number")
    for name in ("base_shift", "max_shift") if followed.use_dynamic_shifting else ():
        check_float(f"{where}: {name}", getattr(followed, name), -7, 7)
    if kind == CONSISTENCY:
        return replace(followed, stochastic_sampling=True)
    return followed


def read(folder: Path, kind: str | None = None) -> Schedule:
    """The schedule of a scheduler's folder.

    Args:
        folder: the folder with ``scheduler_config.json``.
        kind: class that ``model_index.json`` names, if it is known.

    Raises:
        UserError: see :func:`of`; or the two files name different classes.
    """
    path = folder / "scheduler_config.json"
    config: dict[str, object] = json_io.read(path)
    # diffusers takes the class's default for these, whatever value stands beside them.
    unset = json_io.convert(
        config.get("_use_default_values", []), tuple[str, ...], f"{path}: _use_default_values"
    )
    config = {key: value for key, value in config.items() if key not in unset}
    named = config.get("_class_name") or kind or EULER
    if kind is not None and named != kind:
        raise UserError(f"{path} is of {named}, but model_index.json names {kind}: make them the same")
    return of(str(named), config, str(path))


def of_scheduler(scheduler: Any) -> Schedule:
    """The schedule of a scheduler of diffusers.

    Raises:
        UserError: see :func:`of`.
    """
    kind = type(scheduler).__name__
    return of(kind, scheduler.config, "the scheduler")


def schedule_shift(config: Any, tokens: int) -> float:
    """The shift ``s`` of the sampling grid of images of so many tokens.

    With dynamic shifting ``mu`` grows in a straight line with the tokens, and the grid is
    ``t = e^mu / (e^mu + 1 / u - 1)``: equation 23 of arXiv 2403.03206 (``flow.shift``) with ``s = e^mu``.

    Args:
        config: a :class:`Schedule`, or the configuration of a scheduler.
        tokens: patches of latents in an image.

    Raises:
        UserError: the shift at so many tokens is no positive number.
    """
    if not config.use_dynamic_shifting:
        return float(config.shift)
    low, high = config.base_image_seq_len, config.max_image_seq_len
    along = (tokens - low) / (high - low)
    mu = config.base_shift + along * (config.max_shift - config.base_shift)
    exponential = config.time_shift_type == "exponential"
    return check_float(
        f"the shift at {tokens} tokens", math.exp(min(mu, 99)) if exponential else mu, 1e-3, 1e3
    )
