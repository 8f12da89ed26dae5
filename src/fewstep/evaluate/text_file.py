"""A text file of prompts as a prompt set."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.types import UserError
from fewstep.evaluate.metric import Prompt
from fewstep.evaluate.prompt_set import PromptGroup, PromptSet


def read(path: Path) -> PromptSet:
    """Return the prompts of a UTF-8 text file, one per line; empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the prompts in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompts in {path} are not UTF-8 text") from None
    prompts = [Prompt(line.strip()) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"there is no prompt in {path}")
    return PromptSet(path.name, (PromptGroup(prompts),))
