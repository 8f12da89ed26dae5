"""Runs engines in turn, each in its own process, and makes a record of each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.bench import roofline
from fewstep.bench.engines import DIFFUSERS, FEWSTEP, Spec
from fewstep.bench.hardware import DevicePeak
from fewstep.core.types import UserError
from fewstep.data.folders import list_files
from fewstep.images.psnr import psnr


@dataclass(frozen=True)
class BenchRecord:
    """The measurement of one engine.

    Attributes:
        model: the model as the user named it.
        engine: what ran it.
        bits: of a stored weight.
        steps: sampling steps.
        guidance: guidance scale, if any.
        batch: images in one batch.
        size: width and height in pixels.
        cold: seconds from the start of the process to its first images.
        seconds: stage -> median, minimum and maximum over the rounds, warm, of a whole batch.
        peak: peak memory of the process in bytes.
        device_peak: peak memory of tensors on a GPU in bytes; 0 without a GPU.
        disk: bytes of the model's files.
        floor: stage -> roofline bound of this device in seconds, for graphs that can be counted.
        psnr: of the first image to the first engine's, dB; ``None`` for the first engine, for equal images,
            and if sizes or steps differ.
        times_faster: time of the first diffusers baseline over this engine's, median over paired rounds;
            ``None`` if the number of steps differs.
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

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        arguments = asdict(spec) | {"started": time.time()}
        self.errors = tempfile.TemporaryFile("w+")  # an unread pipe would fill and block the process
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        threads = dict.fromkeys(names, str(spec.threads)) if spec.threads else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fewstep.bench.worker", json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | threads | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def generate(self, prompt: str, save: Path | None = None) -> dict[str, Any]:
        """Generate a batch, and return what the process reports.

        Raises:
            UserError: the process failed; the message quotes its last line.
        """
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        seeds = list(range(self.spec.batch))
        request = {"prompt": prompt, "seeds": seeds, "save": str(save) if save else None}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{self.spec.model} failed: {last.rpartition('UserError: ')[2]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(
    specs: Sequence[Spec],
    prompt: str,
    rounds: int,
    peak: DevicePeak,
    on_progress: Callable[[str, int, int], None],
) -> list[BenchRecord]:
    """Run all engines on the same images in turn, ``rounds`` times after one round that is not counted.

    Args:
        specs: the engines.
        prompt: of all images; image ``i`` of a batch has seed ``i``.
        rounds: at least 1.
        peak: peak rates of the device, for roofline bounds.
        on_progress: called with the current activity, how much is done, and of how much (0: unknown).

    Raises:
        UserError: an engine failed.
    """
    workers: list[Worker] = []
    try:
        with tempfile.TemporaryDirectory() as work:
            first: list[dict[str, Any]] = []
            for index, spec in enumerate(specs):
                engine = "" if spec.engine == FEWSTEP else f", {spec.engine} {spec.dtype}"
                on_progress(f"{spec.model}{engine}: first image", 0, 0)
                workers.append(Worker(spec))
                first.append(workers[-1].generate(prompt, Path(work) / f"{index}.npy"))
            images = [np.load(Path(work) / f"{index}.npy") for index in range(len(specs))]
        bounds = [_bounds(spec, one["steps"]) for spec, one in zip(specs, first, strict=True)]
        turns: list[list[dict[str, Any]]] = []
        for number in range(rounds + 1):
            on_progress("rounds in turn", number, rounds + 1)
            turns.append([worker.generate(prompt) for worker in workers])
    finally:
        for worker in workers:
            worker.close()
    del turns[0]
    baseline = next((index for index, spec in enumerate(specs) if spec.engine == DIFFUSERS), None)
    return [
        _record(
            spec, first[i], [turn[i] for turn in turns],
            {stage: cost.seconds(peak) for stage, cost in bounds[i].items()},
            first_psnr(images[0], images[i]) if i and first[i]["steps"] == first[0]["steps"] else None,
            [] if baseline is None else [turn[baseline] for turn in turns],
        )
        for i, spec in enumerate(specs)
    ]  # fmt: skip


def _bounds(spec: Spec, steps: int) -> dict[str, roofline.GraphCost]:
    path = _path(spec)
    return roofline.bundle_cost(path, spec.batch, steps) if (path / "bundle.json").is_file() else {}


def _record(
    spec: Spec,
    first: dict[str, Any],
    turns: Sequence[dict[str, Any]],
    bounds: dict[str, float],
    first_psnr: float | None,
    baseline: Sequence[dict[str, Any]],
) -> BenchRecord:
    last = turns[-1]
    seconds: dict[str, list[float]] = {}
    for stage in last["seconds"]:
        times = [turn["seconds"][stage] for turn in turns]
        seconds[stage] = [statistics.median(times), min(times), max(times)]
    path = _path(spec)
    ratios = [
        theirs["seconds"]["whole"] / own["seconds"]["whole"]
        for theirs, own in zip(baseline, turns, strict=bool(baseline))
        if theirs["steps"] == own["steps"]
    ]
    files = [path] if path.is_file() else [file for file in list_files(path).files if file.is_file()]
    return BenchRecord(
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
        disk=sum(file.stat().st_size for file in files),
        floor=bounds,
        psnr=first_psnr,
        times_faster=statistics.median(ratios) if ratios else None,
    )


def first_psnr(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return the PSNR of the first images of two batches in dB.

    Both are uint8 ``[B, h, w, 3]``. It is ``None`` for equal images and for other sizes.
    """
    if one.shape[1:] != other.shape[1:]:
        return None
    value = psnr(one[0], other[0])
    return None if value == float("inf") else value


def _path(spec: Spec) -> Path:
    from fewstep.pipeline.resolve import parse_family, resolve

    return resolve(parse_family(spec.model)[1]) if spec.engine == FEWSTEP else Path(spec.model)
