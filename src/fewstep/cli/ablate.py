"""The commands ``ablate fashion`` and ``ablate pocket``."""

from __future__ import annotations

from cyclopts import App

from fewstep.core.optional import need
from fewstep.core.progress import emit
from fewstep.experiments.fashion.options import DEFAULT, FashionOptions

app = App(name="ablate")
app.command("fewstep.experiments.ablate:ablate", name="pocket")


@app.command
def fashion(*, options: FashionOptions = DEFAULT) -> None:
    """Compare distillation methods on Fashion-MNIST: data, judge, teacher, warm starts, rates, cells, tables.

    The same command resumes after a stop. A cell with a result file is not run again.
    Part primary has all methods at 4 steps, few-steps the main ones at 2 and 1 steps. Part split compares
    split fine-tuning with plain updates. Part gradient measures noise and bias of the gradient. Part
    factorial crosses score point, proxy target, anchor, weighting and heads.

    Args:
        options: Shared.
    """
    need("torch", "diffusers", "transformers")
    from fewstep.experiments.fashion.run import run

    emit(str(run(options)))
