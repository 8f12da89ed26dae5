"""A torch family as a diffusers folder, which the stock pipeline and other programs load (floor 3)."""

from __future__ import annotations

from pathlib import Path

from fewstep.families import Family, sd3


def export(family: Family, folder: str | Path) -> None:
    """Write ``family`` where ``StableDiffusion3Pipeline.from_pretrained`` finds it.

    Raises:
        UserError: something else lies at ``folder``, or the disk refuses.
    """
    sd3.save(family, folder)
