"""The command ``fewstep bench``."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fewstep.core.cpu import threads as counted_threads
from fewstep.core.optional import need
from fewstep.core.progress import Progress, emit
from fewstep.core.types import UserError
from fewstep.core.validate import parse_bytes
from fewstep.inference.options import TorchOptions

if TYPE_CHECKING:
    from fewstep.bench.run import Record, Spec

PLAIN = TorchOptions()


def bench(
    *models: str,
    baseline: tuple[Path, ...] = (),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",),
    prompt: str = "a red apple, 3D style",
    steps: tuple[int, ...] = (),
    batch_size: tuple[int, ...] = (1,),
    rounds: int = 5,
    threads: int = 0,
    output: Annotated[Path, Parameter(name=["-o", "--output"])] = Path("bench.jsonl"),
    end_to_end: Annotated[bool, Parameter(negative="")] = False,
    plot: Path | None = None,
    records: tuple[Path, ...] = (),
    quality: Path | None = None,
    metric: str = "kid_teacher",
    torch: TorchOptions = PLAIN,
) -> None:
    """Measure what generation costs here, stage by stage, all engines in turn; or draw what was measured.

    Every engine is a process of its own and draws the same pictures as the others, one after the other. A
    record each, with this device's description, is added to a file of JSON lines.

    Args:
        models: The models, as generate takes them. [default: the one that ships]
        baseline: A diffusers folder for the stock pipeline in eager mode, or what `fewstep export --to genai`
            wrote for OpenVINO GenAI's pipeline; several take their turns.
        dtypes: Of the stock pipeline.
        prompt: What to draw.
        steps: Sampling steps; several are measured one after the other. [default: each model's own]
        batch_size: Pictures at once; several are measured one after the other.
        rounds: Counted rounds, after one that is not counted.
        threads: Processor threads of each; 0 takes one a core.
        output: The file that the records are added to.
        end_to_end: Time whole processes from a prompt to a PNG instead, ours in turn with the stock
            pipeline's.
        plot: A folder for latency.png and quality.png of records that are there; nothing is measured.
        records: Their files. [default: --output]
        quality: A results.json of `fewstep evaluate`, for quality.png.
        metric: Which of its figures.
        torch: How a PyTorch model shall run, and the stock pipeline where; without any of these words both do
            in float32 (or --dtypes) on the CPU.
    """
    if plot is not None:
        _draw(plot, records or (output,), quality, metric)
        return
    if rounds < 1 or min(*steps, *batch_size, 1) < 1 or not batch_size:
        raise UserError("--rounds, --steps and --batch-size must be at least 1")
    counted_threads(threads)
    if end_to_end and (dtypes != ("float32",) or batch_size != (1,) or len(steps) > 1):
        raise UserError("--end-to-end takes no --dtypes and no --batch-size, and --steps once")
    if torch.memory is not None:
        parse_bytes(torch.memory)
    others = _check(models, baseline)
    torch = replace(torch, lora=_loras(torch.lora, models, others, end_to_end))
    if end_to_end:
        _whole(models, others, prompt, steps[0] if steps else 4, rounds, threads)
        return
    from fewstep.bench.hardware import describe, rates
    from fewstep.bench.run import Spec, measure
    from fewstep.pipeline.loading import DEFAULT, bundle_of

    new = not output.exists()
    _append(output, [])  # what cannot be written is said before anything is measured
    if new:
        output.unlink()
    told: dict[str, Any] = {"device": describe(), "threads": threads}
    with Progress(bars=False) as progress:  # bars would take time of the cores that are measured
        progress("measuring the processor")
        device = rates(threads or told["device"]["cores"])
        name, operations, reads = told["device"]["processor"], device.operations / 1e9, device.bytes / 1e9
        print(f"{name}: {operations:.0f} GFLOP/s, {reads:.1f} GB/s")
        for number in steps or (None,):
            for many in batch_size:
                said = vars(replace(torch, batch=many)) if set(torch.named()) - {"--lora"} else {}
                wish = {**said, **({"lora": torch.lora} if torch.lora else {})}
                specs = [
                    Spec(model, number, many, wish={} if bundle_of(model) else wish)
                    for model in models or (DEFAULT,)
                ]
                for folder in others:
                    specs += _others(folder, number, many, dtypes, wish)
                made = measure(specs, prompt, rounds, threads, device, progress)
                print(_table(made))
                lines = [
                    told | {"rates": asdict(device), "time": time.time()} | asdict(record) for record in made
                ]
                _append(output, lines)
    emit(str(output))


def _check(models: Sequence[str], against: Sequence[Path]) -> list[Path]:
    """Refuse models that are not there, before anything is measured, and a missing library.

    Returns:
        The folders of ``against``; of a run's folder its model.
    """
    from fewstep.pipeline.loading import parse_family, resolve

    need("onnx", extra="bench")
    for model in models:
        resolve(parse_family(model)[1])
    if against:
        need("torch", "diffusers", "transformers")
    others = [resolve(str(folder)) if folder.is_dir() else folder for folder in against]
    if strange := [folder for folder in others if not (folder / "model_index.json").is_file()]:
        raise UserError(f"--baseline {strange[0]}: not a diffusers folder (no model_index.json)")
    return others


def _loras(
    given: Sequence[str], models: Sequence[str], against: Sequence[Path], whole: bool
) -> tuple[str, ...]:
    """LoRAs that all engines can be given.

    Raises:
        UserError: one of the engines would draw without them.
    """
    if not given:
        return ()
    from fewstep.families.lora.adapters import specs
    from fewstep.pipeline.loading import bundle_of

    if against or whole:
        raise UserError("--lora is added to our own models alone: leave out --baseline and --end-to-end")
    for model in models or (None,):
        if model is None or bundle_of(model):
            raise UserError("--lora is for PyTorch models, and a bundle is to be measured: leave it out")
    return specs(given)


def _others(
    folder: Path, steps: int | None, batch: int, dtypes: Sequence[str], wish: Mapping[str, Any]
) -> list[Spec]:
    """Engines of others for what lies in ``folder``."""
    from fewstep.bench.run import Spec
    from fewstep.export.genai import is_ours

    if is_ours(folder):
        return [Spec(str(folder), steps, batch, genai=True)]
    return [Spec(str(folder), steps, batch, dtype, wish=wish) for dtype in dtypes]


def _table(records: Sequence[Record]) -> str:
    """Records as a Markdown table; of every stage the share of the floor."""
    stages = ("text", "modulation", "steps", "decode", "whole")
    titles = ["", *(f"{stage}, ms" for stage in stages)]
    titles += ["spread", "cold, s", "peak, MB", "disk, MB", "PSNR, dB", "times faster"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for record in records:
        cells = [f"{record.engine}, {record.bits} bit, {record.steps} steps, batch {record.batch}"]
        for stage in stages:
            seconds = record.seconds.get(stage)
            least = record.floor.get(stage)
            share = f" ({100 * least / seconds[0]:.0f} %)" if least and seconds else ""
            cells.append(f"{1000 * seconds[0]:.1f}{share}" if seconds else "")
        median, low, high = record.seconds["whole"]
        cells += [f"{low / median:.2f}-{high / median:.2f}", f"{record.cold:.2f}", f"{record.peak / 1e6:.0f}"]
        cells += [f"{record.disk / 1e6:.1f}", "" if record.psnr is None else f"{record.psnr:.1f}"]
        cells.append("" if record.times_faster is None else f"{record.times_faster:.2f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines at once: a reader never sees half of one."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def _draw(folder: Path, files: Sequence[Path], results: Path | None, figure: str) -> None:
    need("matplotlib")
    from fewstep.bench import plot

    records = plot.read(files)
    plot.latency(records, folder / "latency.png")
    emit(str(folder / "latency.png"))
    if results is not None:
        plot.quality(records, plot.scores_of(results, figure), figure, folder / "quality.png")
        emit(str(folder / "quality.png"))


def _whole(
    models: Sequence[str], against: Sequence[Path], prompt: str, steps: int, rounds: int, threads: int
) -> None:
    """Whole processes of one model and the stock pipeline, in turn."""
    from fewstep.bench.diffusers_process import run_pairs
    from fewstep.families import sd3

    if len(against) != 1 or len(models) > 1:
        raise UserError("--end-to-end compares one model with the stock pipeline: name it with --baseline")
    sd3.ARCHITECTURE.read_index(against[0])
    cores = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as work, Progress(bars=False) as progress:
        progress("timing whole processes")
        result = run_pairs(
            models[0] if models else None, against[0], prompt, steps, rounds, cores, Path(work)
        )
    print(f"{'whole process':16}{'seconds (min, median, max)':>30}{'peak memory':>14}")
    for name, side in (("fewstep", result.ours), ("stock diffusers", result.stock)):
        print(f"{name:16}{_spread([c.seconds for c in side]):>30}{max(c.megabytes for c in side):>11.0f} MB")
    print(f"ours is {result.ratio:.1f} times faster (median of {rounds} pairs)")
    print(f"the two pictures agree to {result.psnr:.1f} dB PSNR")


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}  {statistics.median(values):.2f}  {max(values):.2f}"
