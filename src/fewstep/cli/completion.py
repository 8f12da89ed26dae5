"""The command ``--install-completion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.core.progress import emit
from fewstep.core.types import UserError


def install(
    *,
    shell: Literal["bash", "zsh", "fish", "powershell"] | None = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> None:
    """Install completion of commands and options in a shell, and print the script's path.

    Args:
        shell: The shell. [default: the one that runs this command]
        output: Write the script to this file, and leave the shell's startup file as it is.
            [default: the shell's folder for completion scripts]
    """
    from cyclopts.completion.detect import ShellDetectionError

    from fewstep.cli.app import application

    app = application()
    try:
        path = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError:
        raise UserError("the shell is unknown: give --shell bash, zsh, fish or powershell") from None
    emit(str(path))
