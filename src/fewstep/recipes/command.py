"""``fewstep train`` and ``fewstep distill``: every recipe is a command, its options are the function's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from cyclopts import App

train = App(
    name="train", help="Train Pocket's parts (codec, text encoders, teacher) and the judge of scenes."
)
distill = App(name="distill", help="Teach a student the teacher's pictures in a few steps.")


def _offer(app: App, name: str, recipe: str) -> None:
    """Offer ``fewstep.recipes.RECIPE.RECIPE`` as the command ``name``: make the run, then carry it out."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"fewstep.recipes.{recipe}"), recipe)

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        from fewstep.train.trainer import train as carry_out

        run = function(*args, **options)
        carry_out(run)
        print(run.folder)

    app.command(command, name=name)


for _name in ("pocket-codec", "pocket-text", "pocket-teacher", "scene-detector"):
    _offer(train, _name, _name.replace("-", "_"))
_offer(distill, "trajectory", "distill_trajectory")
