"""Recipes of distillation, one file per method.

A recipe is a function that turns the options of ``fewstep distill METHOD`` into a
:class:`~fewstep.train.run.Run`, or into several runs that are trained one after the other. Its keyword
arguments are the options of the command; ``config`` holds those that all methods share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

from fewstep.core import plugins
from fewstep.core.types import UserError
from fewstep.train.run import Run

Recipe = Callable[..., Run | Iterator[Run]]


def load_recipe(method: str) -> Recipe:
    """Return the recipe of a method.

    Args:
        method: a module here; the import path of a module with a function ``recipe``, or of a function, as
            ``module:function``; or an entry point of the group ``fewstep.method`` that is either.

    Raises:
        UserError: there is no such method, or it has no recipe.
    """
    found = plugins.load(method, __name__, "method")
    recipe: Recipe | None = getattr(found, "recipe", None) if isinstance(found, ModuleType) else found
    if not callable(recipe):
        raise UserError(f"the method {method} has no function recipe")
    return recipe
