"""The command line: which command, and how errors end it.

Commands are named by import strings, so that ``fewstep --help`` loads none of them.

======  ==========================================================================
status  meaning
======  ==========================================================================
0       done
2       bad input or a closed pipe; one line on standard error says what was wrong
129     SIGHUP: the terminal went away
130     Ctrl-C
143     SIGTERM
======  ==========================================================================
"""

from __future__ import annotations

import gc
import io
import os
import sys
from contextlib import suppress

from fewstep.core import signals

# Until main() listens to them, a signal ends in Python's own words: all that takes long is imported later.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from cyclopts import App

COMMANDS = {
    "generate": ("fewstep.cli.generate:generate", "Draw pictures of prompts."),
    "show": ("fewstep.cli.show:show", "Print how a picture was made."),
    "models": ("fewstep.cli.show:models", "List the models that are installed."),
    "data": ("fewstep.cli.data:app", "Make training data."),
    "sample-teacher": (
        "fewstep.cli.sample_teacher:sample_teacher",
        "Write a teacher's samples as shards.",
    ),
    "train": ("fewstep.cli.train:train", "Train Pocket's parts, and what judges scenes."),
    "distill": ("fewstep.cli.train:distill", "Distil a few-step student from a teacher."),
    "estimate-memory": (
        "fewstep.distill.memory_estimate:estimate_memory",
        "Print the GPU memory that a distillation's step needs.",
    ),
    "gradient-noise": (
        "fewstep.experiments.gradient_noise:gradient_noise",
        "Measure how noisy the gradient of matching is.",
    ),
    "ablate": ("fewstep.experiments.ablate:ablate", "Compare all methods of distillation in one table."),
    "export": ("fewstep.cli.export:export", "Write a trained model for the program that shall run it."),
    "quantize": (
        "fewstep.experiments.quantize_report:quantize",
        "Write a model in fewer bits, and what that costs.",
    ),
    "evaluate": ("fewstep.cli.evaluate:evaluate", "Measure what a model draws."),
    "bench": ("fewstep.cli.bench:bench", "Time a generation against stock diffusers."),
}


class _Dash(str):
    """A bare ``-``: a value, which the parser would take for an option by how it starts."""

    def startswith(self, *_: object) -> bool:
        return False


def main() -> NoReturn:
    """The program ``fewstep``: run its arguments, then leave."""
    generating = sys.argv[1:2] == ["generate"]
    if generating:
        gc.set_threshold(100_000)  # imports allocate much and free little: 15 ms of looking in vain
    try:
        signals.listen()  # trainings have handlers of their own
        status = run(sys.argv[1:])
        signals.unlisten()
    except signals.Stop as stop:  # after the command, or before it
        status = stop.status
    if not generating:
        sys.exit(status)
    with suppress(OSError):
        sys.stderr.flush()
    # Taking onnxruntime and numpy apart at exit would cost 50 ms more; every file is closed by now.
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run ``fewstep`` with ``arguments`` in this process and return its exit status."""
    if sys.stderr is None:  # closed by whoever started us
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a sign is told its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _stoppable(list(arguments))
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, signals.Stop) else signals.Stop()
        status = _end(stop.word, stop.status)
    except BrokenPipeError:
        status = 2  # nobody is left to tell
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        status = 2  # the same: the printer of --help turns one into the other
    except OSError as error:
        from fewstep.core.atomic import FULL

        if error.errno in FULL:
            status = _end(f"cannot write {error.filename or 'to standard output'}: {error.strerror}", 2)
        elif error.filename is not None:  # a path of the user's that nobody checked before
            status = _end(f"{str(error.filename)[:200]}: {error.strerror}", 2)
        else:
            raise
    return _flush(status)


def _stoppable(tokens: list[str]) -> int:
    """Run ``tokens``. An error after a signal is what some library made of it: the signal is raised again."""
    try:
        return _run(tokens)
    except Exception:
        signals.check()
        raise


def _flush(status: int) -> int:
    """Write what was printed, or give it up: Python would complain in its own words at exit."""
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if status == 0 and not isinstance(error, BrokenPipeError):
            _end(f"cannot write to standard output: {error.strerror}", 2)
        return status or 2
    return status


def _run(tokens: list[str]) -> int:
    import warnings

    from cyclopts import CycloptsError

    from fewstep.core.optional import missing_extra
    from fewstep.core.types import UserError
    from fewstep.pipeline.loading import quiet_loggers

    quiet_loggers()
    _calm()
    tokens = [_Dash(token) if token == "-" else token for token in tokens]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _our_warnings(warnings.showwarning)
            if tokens[:1] == ["distill"] and len(tokens) > 1:
                from fewstep.cli.train import add_method

                add_method(tokens[1])
            call = application()
            status = call(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return status if isinstance(status, int) else 0
    except UserError as error:
        return _end(str(error), 2)
    except CycloptsError as error:
        from fewstep.cli.errors import explain

        return _end(explain(error, list(COMMANDS)), 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be there
            raise
        return _end(
            "the GPU's memory is full: generate --memory and fewstep estimate-memory say what fits", 2
        )
    except ImportError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        return _end(str(missing), 2)


def _calm() -> None:
    """Let libraries that are imported later print errors alone, here and in processes of ours.

    What they say of their own insides reads like a failure of what was asked for.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _our_warnings(plain: Callable[..., None]) -> Callable[..., None]:
    """Print our own warnings as one line, and of libraries' those about numbers; ``python -W`` shows all."""

    def show(message: Warning | str, category: type[Warning], *more: object, **named: object) -> None:
        from fewstep.core.progress import say

        if category.__module__.startswith("fewstep."):
            say(f"warning: {message}")
        elif sys.warnoptions or issubclass(category, RuntimeWarning):
            plain(message, category, *more, **named)

    return show


def application() -> App:
    """The command line, nothing imported yet."""
    from cyclopts import App

    from fewstep import __version__

    app = App(
        name="fewstep",
        help="Few-step image generation: a prompt to a picture in four steps, and how to distil for it.",
        version=__version__,
        version_flags="--version",
        suppress_keyboard_interrupt=False,
    )
    for name, (place, text) in COMMANDS.items():
        app.command(place, name=name, help=text)
    return app


def _end(message: str, status: int) -> int:
    from fewstep.core.progress import say

    say(message)
    return status
