"""Commands killed at random moments: each rerun ends as if undisturbed, and nothing unfinished stays.

``python tests/robustness/killed.py --moments 25`` prints a line a command. Its processes are forked from one
that has
imported PyTorch already, so that the moments fall into the work; ``--fresh`` starts a new Python for each.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/helpers")]

IMPORTED = (
    "diffusers.models.transformers.transformer_sd3",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.onnx",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""What takes long to import: before the fork, for all processes."""

State = Mapping[str, str]
"""Path in the output folder -> digest of what is deterministic in it."""


@dataclass(frozen=True)
class Command:
    """A command of ``fewstep`` that writes into ``out``.

    Attributes:
        words: the command, but for its output.
        earlier: the same with other results, which lie there before; empty for nothing.
        units: of the output's paths, the part that is replaced as a whole.
        ignored: paths whose content is not deterministic.
    """

    words: list[str]
    earlier: list[str] = field(default_factory=list)
    units: Callable[[str], str] = lambda path: path
    ignored: str = r"$^"


class Failure(Exception):
    """A killed command left what it must not, or did not end as if undisturbed."""


def commands(inputs: Path) -> dict[str, Command]:
    """The commands by name. ``inputs`` is filled by :func:`prepare`."""
    stickers = str(inputs / "stickers")
    teacher, walks = str(inputs / "teacher"), str(inputs / "walks")
    pictures, others = str(inputs / "pictures"), str(inputs / "others" / "pictures")
    run = r"tensorboard/.*"
    learn = [
        "--teacher",
        teacher,
        "--samples",
        walks,
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    sample = [
        "sample-teacher",
        "--teacher",
        teacher,
        "--prompts",
        str(inputs / "prompts.txt"),
        "--num-samples",
        "240",
    ]
    sample += ["--steps", "4"]
    data = ["data", "folder", "--size", "64"]
    return {
        "export": Command(
            ["export", "pocket", "--to", "openvino", "--compute", "bfloat16"],
            ["export", "pocket", "--to", "openvino", "--name", "earlier"],
            units=lambda path: "out",
        ),
        "quantize": Command(
            ["quantize", teacher, "--prompts", "0", "--rounds", "1", "--bits", "8"],
            ["quantize", teacher, "--prompts", "0", "--rounds", "1", "--bits", "8", "--name", "earlier"],
            units=lambda path: path.split("/")[0],
        ),
        "data": Command([*data, pictures], [*data, others]),
        "train": Command(
            ["train", "scene-detector", "--data", stickers, "--steps", "6", "--batch-size", "2"],
            units=lambda path: "/".join(path.split("/")[:2 if path.startswith("checkpoints") else 1]),
            ignored=run,
        ),
        "distill": Command(
            ["distill", "trajectory", *learn, "--steps", "40", "--lora", "2", "--validate-every", "20"],
            units=lambda path: "/".join(path.split("/")[:2 if path.startswith("checkpoints") else 1]),
            ignored=run,
        ),
        "synthesize": Command([*sample, "--student-steps", "2", "--per-shard", "2", "--images"]),
    }  # fmt: skip


def prepare(inputs: Path) -> None:
    """Write what the commands read: small random models and pictures."""
    import numpy as np
    from PIL import Image
    from tests.helpers import taught, tiny_stickers

    taught.make(inputs)
    tiny_stickers.make(inputs / "stickers", 4)
    (inputs / "prompts.txt").write_text("\n".join(taught.PROMPTS))
    for seed, folder in enumerate((inputs / "pictures", inputs / "others" / "pictures")):
        folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for number in range(1100):  # two shards
            image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
            image.save(folder / f"{number:04d}.png")
            (folder / f"{number:04d}.txt").write_text(f"number {number}")


def state(out: Path, ignored: str) -> State:
    """What lies in ``out``, hidden files apart."""
    found: dict[str, str] = {}
    for path in sorted(out.rglob("*")) if out.is_dir() else []:
        name = path.relative_to(out).as_posix()
        if path.is_file() and not re.fullmatch(ignored, name) and not _hidden(name):
            found[name] = hashlib.sha256(_deterministic(path)).hexdigest()[:12]
    return found


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".metadata" for part in name.split("/"))


def _deterministic(path: Path) -> bytes:
    """A file without times and speeds."""
    if path.name == "log.jsonl":
        lines = []
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the last one of a killed run; the next run removes it
                continue
            lines.append({key: value for key, value in line.items() if key not in ("time", "steps_per_s")})
        return json.dumps(lines).encode()
    if path.name == "report.md":
        return re.sub(r"\d+\.\d+", "", path.read_text()).encode()
    return path.read_bytes()


def leftovers(out: Path) -> list[str]:
    """What is unfinished, or a lock, in ``out`` and beside it."""
    there = [path.relative_to(out.parent).as_posix() for path in out.parent.rglob("*")]
    return [name for name in there if _hidden(name) or re.search(r"\.(part|partial|old|tmp)\b", name)]


def run(words: list[str], log: Path, fresh: bool, after: float | None = None) -> int:
    """Run ``fewstep``, killed with all its children ``after`` so many seconds; its exit status."""
    process = _fresh(words, log) if fresh else _forked(words, log)
    until = None if after is None else time.monotonic() + after
    while until is not None and time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if until is not None:
        os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _fresh(words: list[str], log: Path) -> int:
    with log.open("w") as file:
        command = [sys.executable, "-m", "fewstep", *words]
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True).pid


def _forked(words: list[str], log: Path) -> int:
    for module in IMPORTED:
        importlib.import_module(module)
    process = os.fork()
    if process == 0:
        _become(words, log)
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(process, process)  # in both, for whoever comes first
    return process


def _become(words: list[str], log: Path) -> NoReturn:
    from fewstep.cli import app as cli

    status = 1
    try:
        os.setpgid(0, 0)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["fewstep", *words]
        cli.main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_killed(name: str, command: Command, there: State, old: State, new: State) -> None:
    """What a killed command left is old or new, unit by unit, or absent.

    Raises:
        Failure: it is neither.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for number, each in enumerate((there, old, new)):
        for path, digest in each.items():
            groups.setdefault(command.units(path), [{}, {}, {}])[number][path] = digest
    for unit, (here, before, after) in groups.items():
        if re.fullmatch(r"log\.jsonl|run\.json|checkpoints/.*|best|sheets", unit):
            continue  # on the way there are others; whether they are whole is seen when the run goes on
        if here not in (before, after, {}) or (not here and unit == "out" and before):
            raise Failure(f"{name}: {unit} is neither what it was nor what it shall be")


class Trial:
    """A command, undisturbed at first, then killed at some moments.

    Args:
        name: of the command.
        command: to try.
        place: a folder of its own.
        fresh: whether each process is a new Python.
        with_old: whether an earlier result lies where it writes.
    """

    def __init__(self, name: str, command: Command, place: Path, fresh: bool, with_old: bool) -> None:
        self.name, self.command, self.fresh = name + with_old * " over an earlier result", command, fresh
        self.before, self.room = place / "before", place / "room"
        self.out, self.log = self.room / "out", place / "log"
        place.mkdir()
        self.before.mkdir()
        self.old: State = {}
        self._begin()
        if with_old:
            self._carry_out(command.earlier)
            self.old = state(self.out, command.ignored)
            shutil.copytree(self.out, self.before / "out")
        self._begin()
        since = time.monotonic()
        self._carry_out(command.words)
        self.seconds = time.monotonic() - since
        self.new = state(self.out, command.ignored)
        if left := leftovers(self.out):
            raise Failure(f"{self.name}: an undisturbed run left {left}")

    def killed(self, moments: list[float]) -> str:
        """Kill it at each of ``moments``, shares of its time, and run it again; what happened, in a line.

        Raises:
            Failure: something is not as it must be.
        """
        found = begun = 0
        for moment in moments:
            after = self._kill(moment)
            begun += self.out.exists()
            found += bool(leftovers(self.out))
            there = state(self.out, self.command.ignored)
            check_killed(self.name, self.command, there, self.old, self.new)
            self._carry_out(self.command.words)
            self._check_rerun(f"{self.name}, killed at {after:.2f} s and run again")
        return (
            f"{self.name}: killed at {len(moments)} moments of {self.seconds:.1f} s; {begun} left an output, "
            f"{found} something unfinished or a lock; each rerun ended as undisturbed, with no leftovers"
        )

    def _kill(self, moment: float) -> float:
        """Kill it at a moment; the seconds until then. It may be quicker than it was: then once more."""
        while True:
            self._begin()
            since, after = time.monotonic(), moment * self.seconds
            status = run([*self.command.words, "-o", str(self.out)], self.log, self.fresh, after)
            if status == -signal.SIGKILL:
                return after
            if status != 0:
                raise Failure(f"{self.name} failed: {self.log.read_text()[-2000:]}")
            self.seconds = min(self.seconds, time.monotonic() - since)

    def _check_rerun(self, what: str) -> None:
        there = state(self.out, self.command.ignored)
        odd = sorted(path for path in there.keys() | self.new.keys() if there.get(path) != self.new.get(path))
        if odd:
            raise Failure(f"{what}: {odd} differ from an undisturbed run's")
        if left := leftovers(self.out):
            raise Failure(f"{what}: {left} are left")

    def _begin(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        shutil.copytree(self.before, self.room)

    def _carry_out(self, words: list[str]) -> None:
        if run([*words, "-o", str(self.out)], self.log, self.fresh) != 0:
            raise Failure(f"{self.name} failed: {self.log.read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="commands; all by default")
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        prepare(inputs)
        os.chdir(folder)  # where there are no stickers
        known = commands(inputs)
        for name in given.names or known:
            command = known[name]
            many = given.moments // 2 if command.earlier else given.moments
            parts = [(False, many)] + ([(True, given.moments - many)] if command.earlier else [])
            for with_old, number in parts:
                moments = [rng.random() for _ in range(number)]
                place = Path(folder) / f"{name}-{with_old}"
                print(Trial(name, command, place, given.fresh, with_old).killed(moments), flush=True)


if __name__ == "__main__":
    main()
