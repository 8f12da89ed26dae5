"""Errors of torch's distributed checkpoints (DCP), as one line or as a damaged checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fewstep.core.types import UserError

T = TypeVar("T")


@contextmanager
def no_dist_warning() -> Generator[None]:
    """Silence DCP's warning about a single process, which it gives even with ``no_dist``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def write_errors(target: Path, action: Callable[[], T]) -> T:
    """Return the result of an action that writes a checkpoint.

    Raises:
        UserError: the disk is full or refuses.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        return action()
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        if not isinstance(cause, OSError | RuntimeError):
            raise cause from error
        raise UserError(
            f"{target} could not be written ({_summary(cause)}); the earlier checkpoint is kept"
        ) from error


@contextmanager
def read_errors(path: Path) -> Generator[None]:
    """Within the block, separate a broken checkpoint from one that cannot be read at the moment.

    Raises:
        Damaged: the checkpoint is broken.
        UserError: it cannot be read for another reason, such as too little memory or too many open files.
    """
    import torch
    from torch.distributed.checkpoint import CheckpointException

    from fewstep.train.checkpoint_storage import Damaged

    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, UserError):  # of the JSON reader
            raise Damaged(str(cause)) from error
        if isinstance(cause, Damaged | torch.OutOfMemoryError) or not isinstance(cause, Exception):
            raise cause from error
        raise UserError(
            f"{path} cannot be read now ({_summary(cause)}), and is kept: run the same again, or move it "
            "away to go on from the one before"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """Return the error itself; of those that DCP gathers from all processes, a stop or else the first."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    stops = [failure for failure in failures if not isinstance(failure, Exception)]
    return next(iter(stops + failures), error)


def _summary(error: BaseException) -> str:
    """Return an error in one short line."""
    line = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__} {line}".strip()
