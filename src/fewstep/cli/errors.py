"""One line for each error of the command line's parser."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import CycloptsError

MIN_SIMILARITY = 0.7
"""Cutoff of :func:`difflib.get_close_matches` for an option that may have been meant."""

KINDS = {int: "a whole number", float: "a number"}


def explain(error: CycloptsError, commands: Sequence[str]) -> str:
    """Return a line that says what is wrong and what to do.

    Args:
        error: what the parser raised.
        commands: the names of all commands. The parser would import every command to find them.
    """
    import cyclopts as c

    if isinstance(error, c.UnknownCommandError) and error.unused_tokens:
        return _command(error, error.unused_tokens[0], commands)
    if isinstance(error, c.UnusedCliTokensError) and error.unused_tokens:
        return f"{error.unused_tokens[0]} is one argument too many: {_help(error)}"
    if isinstance(error, c.UnknownOptionError):
        return _option(error)
    if isinstance(error, c.MissingArgumentError) and error.argument is not None:
        return _missing(error, error.argument)
    if isinstance(error, c.RepeatArgumentError):
        return f"{error.token.keyword} is given more than once: give it once"
    if isinstance(error, c.CoercionError) and error.token is not None:
        return _value(error, error.token)
    return " ".join(str(error).split())


def _help(error: CycloptsError) -> str:
    return f"see {' '.join(('fewstep', *(error.command_chain or ())))} --help"


def _command(error: CycloptsError, word: str, commands: Sequence[str]) -> str:
    """Name the nearest command. The parser's own text would import every command, and PyTorch with it."""
    group = " ".join(error.command_chain or ())
    if word.startswith("-"):
        return f"there is no option {word}: {_help(error)}"
    names = [name for name in error.app or () if not name.startswith("-")] if group else list(commands)
    near = get_close_matches(word, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(names)}"
    return f"there is no command {f'{group} {word}'.strip()}: {hint}"


def _option(error: Any) -> str:
    word = (error.token.keyword or error.token.value).partition("=")[0]
    names = [name for argument in error.argument_collection if argument.parse for name in argument.names]
    plain = f"--{word.removeprefix('--no-')}"
    if word.startswith("--no-") and plain in names:
        return f"there is no option {word}: leave {plain} out instead"
    bare = {name.lstrip("-"): name for name in names if name.startswith("--")}
    near = (
        get_close_matches(word.lstrip("-"), bare, n=1, cutoff=MIN_SIMILARITY) if word.startswith("--") else []
    )
    return f"there is no option {word}" + (
        f". Did you mean {bare[near[0]]}?" if near else f": {_help(error)}"
    )


def _missing(error: Any, argument: Any) -> str:
    given = error.keyword or next((token.keyword for token in argument.tokens if token.keyword), None)
    if given is not None:
        return f"{given} requires an argument: {_help(error)}"
    if argument.field_info.is_positional:
        return f"{argument.name.lstrip('-').upper()} is missing: {_help(error)}"
    return f"{' or '.join(argument.names)} is missing: {_help(error)}"


def _value(error: Any, token: Any) -> str:
    name = token.keyword or (error.argument.name.lstrip("-").upper() if error.argument is not None else "")
    shown, kind = f"{name}: {token.value[:60]!r}", error.target_type
    if error.msg is not None:
        return f"{name}: {error.msg}"
    if get_origin(kind) is not None and (choices := [str(choice) for choice in get_args(kind)]):
        near = get_close_matches(token.value, choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{shown} is none of its values. Choose from {', '.join(choices)}.{hint}"
    if kind is bool:
        return f"{name} takes no value: give {name} alone, or leave it out"
    return f"{shown} is not {KINDS.get(kind, 'a value that it takes')}"
