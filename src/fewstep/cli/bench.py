"""The command ``fewstep bench``."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
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
    from fewstep.bench.engines import Spec
    from fewstep.bench.run import BenchRecord

PLAIN = TorchOptions()


def bench(
    *models: str,
    baseline: tuple[Path, ...] = (),
    engine: str | None = None,
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
    """Measure time and memory of generation on this device, stage by stage, or plot measurements.

    Every engine runs in its own process. All generate the same images, in turn. A record of each engine, with
    a description of the device, is added to a file of JSON lines.

    Args:
        models: The models, as generate takes them. [default: the model that ships with fewstep]
        baseline: A diffusers folder for the diffusers baseline, a folder of `fewstep export --to genai` for
            OpenVINO GenAI, or what --engine reads; several are measured in turn.
        engine: Engine of the baselines: diffusers, genai, or an import path of your own, such as
            my.module:load. [default: by the folder]
        dtypes: Floating-point types of the diffusers baseline.
        prompt: The text prompt.
        steps: Sampling steps; several are measured one after the other. [default: each model's own]
        batch_size: Images in one batch; several are measured one after the other.
        rounds: Counted rounds, after one that is not counted.
        threads: Processor threads of each engine; 0 takes one per core.
        output: The file that the records are added to.
        end_to_end: Time whole processes from a prompt to a PNG instead, in turn with the diffusers baseline.
        plot: A folder for latency.png and quality.png of existing records; nothing is measured.
        records: Files of records to plot. [default: --output]
        quality: A results.json of `fewstep evaluate`, for quality.png.
        metric: The figure of the results to plot.
        torch: How a PyTorch model runs, and the device of the diffusers baseline. Without these options both
            run in float32 (or --dtypes) on the CPU.
    """
    if plot is not None:
        _plot(plot, records or (output,), quality, metric)
        return
    if rounds < 1 or min(*steps, *batch_size, 1) < 1 or not batch_size:
        raise UserError("--rounds, --steps and --batch-size must be at least 1")
    counted_threads(threads)
    if end_to_end and (dtypes != ("float32",) or batch_size != (1,) or len(steps) > 1 or engine is not None):
        raise UserError("--end-to-end takes no --dtypes, --engine or --batch-size, and --steps once")
    if torch.memory is not None:
        parse_bytes(torch.memory)
    baselines = _check(models, baseline, engine)
    torch = replace(torch, lora=_loras(torch.lora, models, baselines, end_to_end))
    if end_to_end:
        _end_to_end(models, baselines, prompt, steps[0] if steps else 4, rounds, threads)
        return
    from fewstep.bench.engines import Spec
    from fewstep.bench.hardware import describe, rates
    from fewstep.bench.run import measure
    from fewstep.pipeline.resolve import DEFAULT, bundle_of

    new = not output.exists()
    _append(output, [])  # an output that cannot be written is reported before the measurement
    if new:
        output.unlink()
    setting: dict[str, Any] = {"device": describe(), "threads": threads}
    with Progress(bars=False) as progress:  # bars would take time of the cores that are measured
        progress("measuring the processor")
        peak = rates(threads or setting["device"]["cores"])
        name, operations, reads = setting["device"]["processor"], peak.operations / 1e9, peak.bytes / 1e9
        print(f"{name}: {operations:.0f} GFLOP/s, {reads:.1f} GB/s")
        for number in steps or (None,):
            for batch in batch_size:
                named = vars(replace(torch, batch=batch)) if set(torch.named()) - {"--lora"} else {}
                options = {**named, **({"lora": torch.lora} if torch.lora else {})}
                specs = [
                    Spec(model, number, batch, threads=threads, options={} if bundle_of(model) else options)
                    for model in models or (DEFAULT,)
                ]
                for folder in baselines:
                    common = Spec(str(folder), number, batch, threads=threads, options=options)
                    specs += _baselines(common, engine, dtypes)
                measured = measure(specs, prompt, rounds, peak, progress)
                print(_table(measured))
                shared = setting | {"rates": asdict(peak), "time": time.time()}
                _append(output, [shared | asdict(record) for record in measured])
    emit(str(output))


def _check(models: Sequence[str], baselines: Sequence[Path], engine: str | None) -> list[Path]:
    """Refuse missing models, engines and libraries, before anything is measured.

    Returns:
        The folders of the baselines; for the folder of a run its model.
    """
    from fewstep.bench.engines import DIFFUSERS, FEWSTEP, GENAI, find
    from fewstep.pipeline.resolve import parse_family, resolve

    need("onnx", extra="bench")
    for model in models:
        resolve(parse_family(model)[1])
    if engine is not None and not baselines:
        raise UserError("--engine is of a baseline: name its folder with --baseline")
    if engine == FEWSTEP:
        raise UserError("--engine fewstep: give the model without --baseline")
    if engine not in (None, DIFFUSERS, GENAI):
        find(engine)
        if missing := [path for path in baselines if not path.exists()]:
            raise UserError(f"--baseline {missing[0]}: there is no such file or folder")
        return list(baselines)
    if baselines:
        need("torch", "diffusers", "transformers")
    folders = [resolve(str(folder)) if folder.is_dir() else folder for folder in baselines]
    if wrong := [folder for folder in folders if not (folder / "model_index.json").is_file()]:
        raise UserError(f"--baseline {wrong[0]}: not a diffusers folder (no model_index.json)")
    return folders


def _loras(
    given: Sequence[str], models: Sequence[str], baselines: Sequence[Path], end_to_end: bool
) -> tuple[str, ...]:
    """Return the LoRAs for all engines.

    Raises:
        UserError: one of the engines would run without them.
    """
    if not given:
        return ()
    from fewstep.families.lora.adapters import specs
    from fewstep.pipeline.resolve import bundle_of

    if baselines or end_to_end:
        raise UserError("--lora is for fewstep's own models: leave out --baseline and --end-to-end")
    for model in models or (None,):
        if model is None or bundle_of(model):
            raise UserError("--lora is for PyTorch models, and a bundle is measured too: leave it out")
    return specs(given)


def _baselines(common: Spec, engine: str | None, dtypes: Sequence[str]) -> list[Spec]:
    """Return the engines of one baseline folder: one per type for diffusers."""
    from fewstep.bench.engines import DIFFUSERS, GENAI
    from fewstep.export.genai import is_ours

    name = engine or (GENAI if is_ours(Path(common.model)) else DIFFUSERS)
    if name == GENAI:
        return [replace(common, engine=name, options={})]
    if name != DIFFUSERS:
        return [replace(common, engine=name)]
    return [replace(common, engine=name, dtype=dtype) for dtype in dtypes]


def _table(records: Sequence[BenchRecord]) -> str:
    """Return records as a Markdown table; in brackets the roofline bound's share of each stage."""
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
    """Append lines in one write, so that a reader never sees half a line."""
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


def _plot(folder: Path, files: Sequence[Path], results: Path | None, figure: str) -> None:
    need("matplotlib")
    from fewstep.bench import plot

    records = plot.read(files)
    plot.latency(records, folder / "latency.png")
    emit(str(folder / "latency.png"))
    if results is not None:
        plot.quality(records, plot.scores_of(results, figure), figure, folder / "quality.png")
        emit(str(folder / "quality.png"))


def _end_to_end(
    models: Sequence[str], baselines: Sequence[Path], prompt: str, steps: int, rounds: int, threads: int
) -> None:
    """Time whole processes of one model and the diffusers baseline, in turn."""
    from fewstep.bench.diffusers_process import run_pairs
    from fewstep.families import sd3

    if len(baselines) != 1 or len(models) > 1:
        raise UserError("--end-to-end compares one model with one diffusers folder: name it with --baseline")
    sd3.ARCHITECTURE.read_index(baselines[0])
    cores = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as work, Progress(bars=False) as progress:
        progress("timing whole processes")
        result = run_pairs(
            models[0] if models else None, baselines[0], prompt, steps, rounds, cores, Path(work)
        )
    print(f"{'whole process':16}{'seconds (min, median, max)':>30}{'peak memory':>14}")
    for name, side in (("fewstep", result.fewstep), ("diffusers", result.baseline)):
        print(f"{name:16}{_spread([c.seconds for c in side]):>30}{max(c.megabytes for c in side):>11.0f} MB")
    print(f"fewstep is {result.ratio:.1f} times faster (median of {rounds} pairs)")
    print(f"PSNR between the two images: {result.psnr:.1f} dB")


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}  {statistics.median(values):.2f}  {max(values):.2f}"
