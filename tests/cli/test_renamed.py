"""A command line with an old name is answered with today's name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fewstep.cli import app as cli
from fewstep.cli.renamed import COMMANDS, OPTIONS, VALUES, new_name

ROWS = [(command, old, new) for command, options in OPTIONS.items() for old, new in options.items()]

CHOICES = [
    (command, option, old, new) for (command, option), names in VALUES.items() for old, new in names.items()
]


def options_of(command: str) -> set[str]:
    """The options that a command takes."""
    app: Any = cli.application()
    for word in command.split():
        app = app[word]
    arguments = [argument for argument in app.assemble_argument_collection() if argument.parse]
    return {name for argument in arguments for name in argument.names}


@pytest.mark.parametrize(("old", "new"), COMMANDS.items())
def test_a_renamed_command_is_answered_with_its_name(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--help"], ["--out", "x"]):
        assert cli.run([*old.split(), *more]) == 2
        assert capsys.readouterr() == ("", f"fewstep: {old} is now {new}\n")
    assert cli.run([*new.split(), "--help"]) == 0


@pytest.mark.parametrize(("command", "old", "new"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_a_renamed_option_is_answered_with_its_name(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([old, "3"], [f"{old}=3"], [old]):
        assert cli.run([*command.split(), *given]) == 2
        assert capsys.readouterr() == ("", f"fewstep: {old} is now {new}\n")
    known = options_of(command)
    assert new in known and old not in known


@pytest.mark.parametrize(("command", "option", "old", "new"), CHOICES)
def test_a_renamed_value_is_answered_with_its_name(
    command: str, option: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pocket", "-o", "x"] if command == "export" else []
    for given in ([option, old], [f"{option}={old}"]):
        assert cli.run([command, *arguments, *given]) == 2
        assert capsys.readouterr() == ("", f"fewstep: {option} {old} is now {option} {new}\n")


def test_the_negative_of_a_renamed_flag_is_renamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate-memory", "--no-recompute"]) == 2
    line = "fewstep: --no-recompute is now --no-activation-checkpointing\n"
    assert capsys.readouterr() == ("", line)


def test_the_program_itself_answers() -> None:
    command = [sys.executable, "-m", "fewstep", "synthesize", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fewstep: synthesize is now sample-teacher\n"


def test_only_names_of_the_command_line_are_answered() -> None:
    for tokens in (
        [],
        ["generate", "plan", "--steps", "0"],  # a prompt
        ["generate", "--", "--number"],
        ["generate", "a", "--minutes", "3"],  # never an option of this command
        ["export", "single"],
        ["train", "--out"],
    ):
        assert new_name(tokens) is None
    assert cli.run(["models", "--out"]) == 2
