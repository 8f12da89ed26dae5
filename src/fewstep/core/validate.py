"""Checks of values that a user gives."""

from __future__ import annotations

import math
import operator
import re
from typing import SupportsFloat, SupportsIndex, cast

from fewstep.core.types import UserError

MOST_AT_ONCE = 64
"""Most images in one batch of the net."""

MANY = 100
"""Most sampling steps."""


def check_int(name: str, value: object, low: int, high: int) -> int:
    """Return ``value`` as a whole number from ``low`` to ``high``.

    Raises:
        UserError: it is no such number.
    """
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UserError(f"{name} must be a whole number from {low} to {high}, not {_shown(value)}")
    return number


def check_float(name: str, value: object, low: float, high: float) -> float:
    """Return ``value`` as a finite number from ``low`` to ``high``.

    Raises:
        UserError: it is no such number.
    """
    try:
        number = float(cast("SupportsFloat", value))
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{name} must be a number from {low:g} to {high:g}, not {_shown(value)}")
    return number


_UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def parse_bytes(text: str) -> int:
    """Return the bytes of a memory size, such as ``24``, ``24GiB``, ``80 GB``, ``512MiB``.

    Raises:
        UserError: it is no such size.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(found[2].lower()) if found else None
    if not found or unit is None or float(found[1]) <= 0:
        raise UserError(f"--memory must be a size such as 24GiB, not {text[:40]}")
    return int(float(found[1]) * unit)


def _shown(value: object) -> str:
    try:
        return str(value)[:40]
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return "that"


def require_positive(**counts: int) -> None:
    """Refuse counts below 1, by the names of their options.

    Raises:
        UserError: one is.
    """
    require_at_least(1, **counts)


def require_at_least(least: int, **counts: int) -> None:
    """Refuse counts below ``least``, by the names of their options.

    Raises:
        UserError: one is.
    """
    for name, count in counts.items():
        if count < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {count}")


def require_fraction(**options: float) -> None:
    """Refuse values that are not from 0 to 1, by the names of their options.

    Raises:
        UserError: one is not.
    """
    for name, share in options.items():
        if not 0 <= share <= 1:
            raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {share}")
