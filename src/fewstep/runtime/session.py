"""A graph of any engine, which is loaded in the background or at its first use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np

from fewstep.core.types import UserError

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""Named inputs -> the outputs in the graph's order."""


class Session(ABC):
    """One graph on the processor.

    Args:
        path: the graph's file.
        threads: threads inside one operator.
    """

    ENGINE: ClassVar[str]

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.threads = threads
        self._maker: Thread | None = None
        self._run: Run | None = None
        self._error: Exception | None = None

    def start(self) -> Session:
        """Load the graph in the background. The engines release Python's lock meanwhile."""
        if self._maker is None:
            self._maker = Thread(target=self._make, name=self.path.name)
            self._maker.start()
        return self

    def __call__(self, **feeds: np.ndarray) -> list[np.ndarray]:
        """Run the graph on named inputs, and return its outputs in the graph's order.

        Raises:
            UserError: the engine cannot load the file, or the graph does not take these inputs.
        """
        self.start()
        assert self._maker is not None
        self._maker.join()
        if self._run is None:
            raise UserError(f"{self.path} cannot be loaded by {self.ENGINE}: {reason(self._error)}")
        try:
            return self._run(feeds)
        except Exception as error:  # as in _make
            raise UserError(f"{self.path} does not fit its bundle: {reason(error)}") from error

    @abstractmethod
    def _load(self) -> Run:
        """Load the file, and return a function that runs the graph."""

    def _make(self) -> None:
        try:
            self._run = self._load()
        except Exception as error:  # the engines' exceptions share no narrower base; raised in __call__
            self._error = error


def reason(error: Exception | None) -> str:
    """Return an engine's error message as one line of limited length."""
    return " ".join(str(error).split())[:200]
