"""The command line: its commands, and the exit status of each ending.

Commands are named by import strings, so that ``fewstep --help`` imports none of them.

======  ==========================================================================
status  meaning
======  ==========================================================================
0       done
2       bad input or a closed pipe; one line on standard error says what was wrong
129     SIGHUP: the terminal was closed
130     Ctrl-C
143     SIGTERM
======  ==========================================================================
"""

from __future__ import annotations

import gc
import io
import os
import sys
from contextlib import nullcontext, suppress

from fewstep.core import signals

# Before main() handles signals, a signal prints a traceback. So slow modules are imported later.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, NoReturn

    from cyclopts import App, Token

COMMANDS = {
    "generate": ("fewstep.cli.generate:generate", "Generate images from text prompts."),
    "show": ("fewstep.cli.show:show", "Print how an image was made."),
    "models": ("fewstep.cli.show:models", "List the installed models."),
    "data": ("fewstep.cli.data:app", "Make training data."),
    "sample-teacher": (
        "fewstep.cli.sample_teacher:sample_teacher",
        "Write a teacher's samples as training data.",
    ),
    "train": ("fewstep.cli.train:train", "Train the parts of Pocket, and the scene detector."),
    "distill": ("fewstep.cli.train:distill", "Distil a few-step student from a teacher."),
    "estimate-memory": (
        "fewstep.distill.memory_estimate:estimate_memory",
        "Estimate the GPU memory of a distillation step.",
    ),
    "gradient-noise": (
        "fewstep.experiments.gradient_noise:gradient_noise",
        "Measure the noise of the gradient of distribution matching.",
    ),
    "ablate": ("fewstep.cli.ablate:app", "Compare the distillation methods in one table."),
    "export": ("fewstep.cli.export:export", "Export a model to another format or runtime."),
    "quantize": (
        "fewstep.experiments.quantize_report:quantize",
        "Quantize a model, and report size, speed and quality.",
    ),
    "evaluate": ("fewstep.cli.evaluate:evaluate", "Measure the quality of generated images."),
    "bench": ("fewstep.cli.bench:bench", "Measure speed and memory beside the diffusers baseline."),
}
"""By command: where its function is, and what the list of commands says."""

GROUPS = ("data", "train", "distill", "ablate")
"""Commands that have commands of their own."""

COMPLETION = "Install completion of commands and options in a shell."


class _LoneDash(str):
    """A lone ``-`` that is a value. The parser takes any string that starts with a dash for an option.

    The parser has a setting that lets an option take such values, but then ``--seed --steps 3`` would
    take ``--steps`` for the seed.
    """

    def startswith(self, *_: object) -> bool:
        return False


def main() -> NoReturn:
    """Run the program ``fewstep`` with the arguments of this process, and exit."""
    generating = sys.argv[1:2] == ["generate"]
    if generating:
        gc.set_threshold(100_000)  # imports free little memory: garbage collection would cost 15 ms
    try:
        signals.listen()  # training has its own handlers
        status = run(sys.argv[1:])
        signals.unlisten()
    except signals.Stop as stop:  # before or after the command
        status = stop.status
    if not generating:
        sys.exit(status)
    with suppress(OSError):
        sys.stderr.flush()
    # Every file is closed by now. Unloading onnxruntime and numpy would cost 50 ms.
    os._exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run ``fewstep`` with ``arguments`` in this process and return its exit status."""
    if sys.stderr is None:  # the parent process closed it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # print the code of a character that a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _stoppable(list(arguments))
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, signals.Stop) else signals.Stop()
        status = _end(stop.word, stop.status)
    except BrokenPipeError:
        status = 2  # nothing can be printed any more
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        status = 2  # rich exits so when the pipe of --help is closed
    except OSError as error:
        from fewstep.core.atomic import FULL

        if error.errno in FULL:
            status = _end(f"cannot write {error.filename or 'to standard output'}: {error.strerror}", 2)
        elif error.filename is not None:  # a path that was not checked before
            status = _end(f"{str(error.filename)[:200]}: {error.strerror}", 2)
        else:
            raise
    return _flush(status)


def _stoppable(tokens: list[str]) -> int:
    """Run ``tokens``. If a library turned a signal into another error, raise the signal again."""
    try:
        return _run(tokens)
    except Exception:
        signals.check()
        raise


def _flush(status: int) -> int:
    """Write what was printed, or drop it. Otherwise Python prints a traceback at exit."""
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

    from fewstep.core.types import UserError
    from fewstep.pipeline.loading import quiet_loggers

    quiet_loggers()
    _quiet_libraries()
    tokens = [_LoneDash(token) if token == "-" else token for token in tokens]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _our_warnings(warnings.showwarning)
            call = application(described=tokens[:1])
            with _extended(tokens):
                status = call(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return status if isinstance(status, int) else 0
    except UserError as error:
        from fewstep.cli.renamed import new_name

        return _end(new_name(tokens) or str(error), 2)
    except CycloptsError as error:
        from fewstep.cli.errors import explain
        from fewstep.cli.renamed import new_name

        return _end(new_name(tokens) or explain(error, list(COMMANDS)), 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, and torch may not be installed
            raise
        return _end(
            "the GPU's memory is full: generate --memory and fewstep estimate-memory say what fits", 2
        )
    except ImportError as error:
        from fewstep.core.optional import missing_extra

        missing = missing_extra(error)
        if missing is None:
            raise
        return _end(str(missing), 2)


def _quiet_libraries() -> None:
    """Let libraries print errors only, in this process and its children.

    Their messages about their own internals read like a failure of the command.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _extended(tokens: Sequence[str]) -> AbstractContextManager[None]:
    """Return a context in which a distillation method from outside is a command, if ``tokens`` names one."""
    if len(tokens) < 2 or tokens[0] != "distill":
        return nullcontext()
    from fewstep.cli.train import outside_method

    return outside_method(tokens[1])


def _our_warnings(plain: Callable[..., None]) -> Callable[..., None]:
    """Print our warnings as one line, and only numerical ones of libraries. ``python -W`` shows all."""

    def show(message: Warning | str, category: type[Warning], *more: object, **named: object) -> None:
        from fewstep.core.progress import say

        if category.__module__.startswith("fewstep."):
            say(f"warning: {message}")
        elif sys.warnoptions or issubclass(category, RuntimeWarning):
            plain(message, category, *more, **named)

    return show


def application(described: Collection[str] = ()) -> App:
    """Return the command line. No command is imported yet.

    Args:
        described: commands that have their docstring as help. Others and :data:`GROUPS` have their line of
            :data:`COMMANDS`.
    """
    from cyclopts import App, Parameter

    from fewstep import __version__

    app = App(
        name="fewstep",
        help="Generate images in a few steps with rectified-flow models, and distil such models.",
        version=__version__,
        version_flags=["--version", "-V"],
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(
            negative_iterable=(), show_default=_shown_default, converter=_convert_value
        ),
    )
    for name, (place, text) in COMMANDS.items():
        app.command(place, name=name, help=None if name in described and name not in GROUPS else text)
    app.command("fewstep.cli.completion:install", name="--install-completion", help=COMPLETION)
    return app


def _convert_value(hint: Any, tokens: Sequence[Token]) -> object:
    """Convert the value of an option. The parser itself rounds 2.5 to 2 for a whole number.

    Raises:
        ValueError: the value is not a whole number, where only one will do.
    """
    from typing import get_args

    from cyclopts import convert

    kinds = (hint, *get_args(hint))
    if int in kinds and float not in kinds and str not in kinds:
        for token in tokens:
            try:
                int(token.value)
            except ValueError:
                raise ValueError(f"{token.value!r} is not a whole number") from None
    return convert(hint, tokens)


def _shown_default(value: object) -> str | None:
    """Return a default as help shows it: nothing for a flag that is off and an empty list."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _end(message: str, status: int) -> int:
    from fewstep.core.progress import say

    say(message)
    return status
