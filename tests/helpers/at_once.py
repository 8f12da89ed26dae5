"""Many processes draw the same image at once: every one must leave a file of its own.

``python tests/helpers/at_once.py 100 20 [MODEL]`` runs 100 processes, at most 20 alive at a time, for each
of the three ways in which ``fewstep generate`` picks a free name, and prints what they left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fewstep.images.io import open_image

WAYS = {"folder": ("-o", "out/"), "pattern": ("-o", "{prompt}_{seed}.png"), "default": ()}
"""Options of ``fewstep generate`` by the way in which a free name is found."""


@dataclass(frozen=True)
class Left:
    """What the processes left.

    Attributes:
        status: the exit status of each.
        errors: what they said on standard error.
        printed: the paths that they printed.
        files: all files, hidden ones too, relative to the folder.
        images: distinct images among them, by pixels.
    """

    status: list[int]
    errors: list[bytes]
    printed: list[str]
    files: list[str]
    images: int

    def whole(self, number: int) -> bool:
        """Whether ``number`` processes left as many files of one image under the names that they printed."""
        return (
            self.status == [0] * number
            and not any(self.errors)
            and len(set(self.printed)) == len(self.files) == number
            and sorted(self.printed) == self.files
            and self.images == 1
        )


def draw_at_once(folder: Path, model: str, way: str, number: int, alive: int) -> Left:
    """Run ``number`` processes of the same prompt and seed in ``folder``, at most ``alive`` at a time."""
    command = [sys.executable, "-m", "fewstep", "generate", "a red apple", "--seed", "7", "--threads", "1"]
    command += ["--model", model, *WAYS[way]]

    def one(_: int) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, cwd=folder, capture_output=True, check=False, env=dict(os.environ))

    with ThreadPoolExecutor(alive) as pool:
        done = list(pool.map(one, range(number)))
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return Left(
        status=[each.returncode for each in done],
        errors=[each.stderr for each in done],
        printed=[line for each in done for line in each.stdout.decode().splitlines()],
        files=sorted(str(path.relative_to(folder)) for path in paths),
        images=len({np.asarray(open_image(path)).tobytes() for path in paths}),
    )


def main(number: int, alive: int, model: str = "pocket") -> None:
    """Print a line for each way."""
    for way in WAYS:
        with TemporaryDirectory() as folder:
            begun = time.monotonic()
            left = draw_at_once(Path(folder), model, way, number, alive)
            verdict = "whole" if left.whole(number) else "NOT WHOLE"
            print(
                f"{way}: {len(left.files)} files, {len(set(left.printed))} printed names, "
                f"{left.images} distinct image, {left.status.count(0)} exits with 0, "
                f"{time.monotonic() - begun:.0f} s: {verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4])
