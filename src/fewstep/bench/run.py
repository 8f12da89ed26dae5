"""Engines in turn, each in a process of its own, and a record of each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.bench import roofline
from fewstep.bench.hardware import DevicePeak
from fewstep.core.types import UserError
from fewstep.data.folders import list_files
from fewstep.images import psnr as likeness


@dataclass(frozen=True)
class Spec:
    """One engine at one setting.

    Attributes:
        model: as ``fewstep generate --model`` takes it; for the stock pipeline a diffusers folder, for
            OpenVINO GenAI's an export.
        steps: of the walk; the model's own where ``None``.
        batch: pictures at once.
        stock: dtype of the stock pipeline; ``None`` is another engine.
        genai: whether it is OpenVINO GenAI's pipeline; where neither, it is fewstep.
        wish: how a PyTorch model shall run (fields of :class:`fewstep.inference.options.TorchOptions`);
            on the CPU in float32 by default.
    """

    model: str
    steps: int | None
    batch: int
    stock: str | None = None
    genai: bool = False
    wish: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Record:
    """What one engine did.

    Attributes:
        model: as asked for.
        engine: what ran it.
        bits: of a weight, as stored.
        steps: of the walk.
        guidance: its scale, where there is one.
        batch: pictures at once.
        size: width and height in pixels.
        cold: seconds from the start of its process to its first pictures.
        seconds: stage -> median, least and most over the rounds, warm, of a whole batch.
        peak: most memory of its process, bytes.
        device_peak: most that its tensors took of a GPU, bytes; 0 where it used none.
        disk: bytes of its model's files.
        floor: stage -> least seconds that this device could take, where the graph was counted.
        psnr: of its first picture to the first engine's, dB; ``None`` for itself, where they are equal, and
            where sizes or steps differ.
        times_faster: the first engine of the stock pipeline over this one, median over paired rounds;
            ``None`` where it walks another number of steps.
    """

    model: str
    engine: str
    bits: int | None
    steps: int
    guidance: float | None
    batch: int
    size: list[int]
    cold: float
    seconds: dict[str, list[float]]
    peak: int
    device_peak: int
    disk: int
    floor: dict[str, float]
    psnr: float | None
    times_faster: float | None


class Worker:
    """A process of :mod:`fewstep.bench.worker`."""

    def __init__(self, spec: Spec, threads: int) -> None:
        self.spec = spec
        told = asdict(spec) | {"threads": threads, "begun": time.time()}
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill, and stop it
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fewstep.bench.worker", json.dumps(told)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | counts | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def draw(self, prompt: str, save: Path | None = None) -> dict[str, Any]:
        """Draw a batch, and tell what it took.

        Raises:
            UserError: it failed; its last line is told.
        """
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        job = {"prompts": [prompt] * self.spec.batch, "seed": 0, "save": str(save) if save else None}
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no word"])[-1]
            raise UserError(f"{self.spec.model} failed: {last.rpartition('UserError: ')[2]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(
    specs: Sequence[Spec],
    prompt: str,
    rounds: int,
    threads: int,
    rates: DevicePeak,
    told: Callable[[str, int, int], None],
) -> list[Record]:
    """Let all draw the same in turn, ``rounds`` times after one that is not counted.

    Args:
        specs: who.
        prompt: what; picture ``i`` of a batch has seed ``i``.
        rounds: at least 1.
        threads: processor threads of each; 0 leaves their choice.
        rates: of the device, for the floors.
        told: called with what is being done, how much of it is done, and of how much (0: not known).

    Raises:
        UserError: one of them failed.
    """
    workers: list[Worker] = []
    try:
        with tempfile.TemporaryDirectory() as work:
            first: list[dict[str, Any]] = []
            for index, spec in enumerate(specs):
                told(f"{spec.model}{f', diffusers {spec.stock}' if spec.stock else ''}: first picture", 0, 0)
                workers.append(Worker(spec, threads))
                first.append(workers[-1].draw(prompt, Path(work) / f"{index}.npy"))
            pictures = [np.load(Path(work) / f"{index}.npy") for index in range(len(specs))]
        floors = [_floor(spec, one["steps"]) for spec, one in zip(specs, first, strict=True)]
        turns: list[list[dict[str, Any]]] = []
        for number in range(rounds + 1):
            told("rounds in turn", number, rounds + 1)
            turns.append([worker.draw(prompt) for worker in workers])
    finally:
        for worker in workers:
            worker.close()
    del turns[0]
    stock = next((index for index, spec in enumerate(specs) if spec.stock), None)
    return [
        _record(
            spec, first[i], [turn[i] for turn in turns],
            {stage: work.seconds(rates) for stage, work in floors[i].items()},
            psnr(pictures[0], pictures[i]) if i and first[i]["steps"] == first[0]["steps"] else None,
            [] if stock is None else [turn[stock] for turn in turns],
        )
        for i, spec in enumerate(specs)
    ]  # fmt: skip


def _floor(spec: Spec, steps: int) -> dict[str, roofline.GraphCost]:
    place = _place(spec)
    return roofline.bundle_cost(place, spec.batch, steps) if (place / "bundle.json").is_file() else {}


def _record(
    spec: Spec,
    first: dict[str, Any],
    turns: Sequence[dict[str, Any]],
    floors: dict[str, float],
    alike: float | None,
    stock: Sequence[dict[str, Any]],
) -> Record:
    last = turns[-1]
    seconds: dict[str, list[float]] = {}
    for stage in last["seconds"]:
        times = [turn["seconds"][stage] for turn in turns]
        seconds[stage] = [statistics.median(times), min(times), max(times)]
    place = _place(spec)
    ratios = [
        theirs["seconds"]["whole"] / ours["seconds"]["whole"]
        for theirs, ours in zip(stock, turns, strict=bool(stock))
        if theirs["steps"] == ours["steps"]
    ]
    files = [place] if place.is_file() else [path for path in list_files(place).files if path.is_file()]
    return Record(
        model=spec.model,
        engine=last["engine"],
        bits=last["bits"],
        steps=last["steps"],
        guidance=last["guidance"],
        batch=spec.batch,
        size=last["size"],
        cold=first["since"],
        seconds=seconds,
        peak=last["peak"],
        device_peak=last["device_peak"],
        disk=sum(path.stat().st_size for path in files),
        floor=floors,
        psnr=alike,
        times_faster=statistics.median(ratios) if ratios else None,
    )


def psnr(one: np.ndarray, other: np.ndarray) -> float | None:
    """Of the first pictures of two batches, uint8 ``[B, h, w, 3]``, dB; ``None`` where they are equal or of
    other sizes."""
    if one.shape[1:] != other.shape[1:]:
        return None
    found = likeness.psnr(one[0], other[0])
    return None if found == float("inf") else found


def _place(spec: Spec) -> Path:
    from fewstep.pipeline.loading import parse_family, resolve

    return Path(spec.model) if spec.stock or spec.genai else resolve(parse_family(spec.model)[1])
