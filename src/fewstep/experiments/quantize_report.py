"""``fewstep quantize``: the same model in fewer and fewer bits, and what each rung costs and saves."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter

from fewstep.core import atomic
from fewstep.core.progress import Progress, emit, say
from fewstep.core.types import UserError
from fewstep.core.validate import require_at_least, require_positive
from fewstep.data.shards import training_shards
from fewstep.images.psnr import psnr
from fewstep.pocket.assemble import check_counts, check_evaluation_inputs
from fewstep.train.preview import SHOWN

if TYPE_CHECKING:
    from fewstep.export.common.calibration import CalibrationStats
    from fewstep.export.common.graphs import GraphSpec
    from fewstep.export.common.onnx_quantize import Choose
    from fewstep.export.common.sensitivity import WeightSensitivity
    from fewstep.families.base import Family
    from fewstep.pipeline.pipeline import Pipeline

FULL = 16
"""Bits that the others are compared with."""

MEASURED_ON = 4
"""Prompts on which a weight's cost is measured."""

CALIBRATED_ON = 256
"""Captions of the data set that are drawn for the inputs of each weight. Pocket in 4 bits, with the bits of a
rung before: 12, 32, 128 and 384 brought 2.0, 2.5, 3.4 and 3.5 dB."""

COLUMNS = (
    ("seen top-5, % of 16 bit", "seen_top5_ratio", 100),
    ("held-out top-5, % of 16 bit", "held_out_top5_ratio", 100),
    ("scenes, % of 16 bit", "scene_ratio", 100),
    ("KID to 16 bit × 1000", "kid_teacher", 1000),
)
"""What a rung's pictures are measured by: title, figure, scale."""


def quantize(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    bits: Annotated[tuple[int, ...], Parameter(negative="")] = (8, 6, 4),
    prompts: int = 100,
    images_per_prompt: int = 2,
    scenes: int = 60,
    detector: Path = Path("models/scene-detector"),
    data: Path | None = None,
    rounds: int = 10,
    name: str | None = None,
    license: str | None = None,
    metadata: Path | None = None,
) -> None:
    """Write a model as bundles of several precisions, and a report of what each costs and saves.

    A rung's bits are an average: what each weight's loss costs is measured on real prompts, and the bits go
    where they save most.

    Args:
        source: A run's folder, a diffusers folder, a hub name, or a Stability .safetensors file.
        output: Folder for the bundles, named after their bits, report.md, sheet.png and sensitivity.json;
            what an earlier ladder left there is replaced.
        bits: To write besides 16.
        prompts: Prompts of single stickers that are measured; 0 leaves out all figures of them and of scenes.
        images_per_prompt: Pictures a prompt.
        scenes: Prompts of scenes; a multiple of 12, or 0 for none.
        detector: Folder of what finds things in scenes.
        data: Folder that `fewstep data stickers` filled, data/stickers unless told. Its captions are drawn
            for the inputs of each weight; without it the prompts of the sheet.
        rounds: Pictures that are timed, of all rungs in turn.
        name: The model's name; by default what the source calls itself.
        license: Name of the weights' licence, such as Apache-2.0.
        metadata: A JSON object of facts that go along.
    """
    from fewstep.core.optional import need
    from fewstep.data.captions import prompts_of
    from fewstep.export import onnx
    from fewstep.export.common.bundle import check_place
    from fewstep.export.common.graphs import parts, trace
    from fewstep.export.common.output_paths import check_folder, write_errors
    from fewstep.export.common.sensitivity import allocate_bits, calibrate
    from fewstep.export.metadata import facts_of, read_metadata
    from fewstep.pipeline.loading import kind_of, load_family
    from fewstep.pipeline.resolve import parse_family, resolve

    require_positive(rounds=rounds, images_per_prompt=images_per_prompt)
    require_at_least(0, prompts=prompts, scenes=scenes)
    if prompts:
        check_counts(prompts, scenes)
    more = read_metadata(metadata)
    rungs, possible = [FULL, *sorted(set(bits), reverse=True)], sorted(b for b in onnx.BITS if b < FULL)
    if odd := [number for number in rungs[1:] if number not in possible]:
        raise UserError(f"--bits {odd[0]}: give some of {', '.join(map(str, possible))}; {FULL} comes along")
    need("torch", "diffusers", "transformers")
    need(*onnx.needs(FULL))
    check_folder(output)
    place = resolve(parse_family(source)[1])
    if any((output / index).exists() for index in ("model_index.json", "bundle.json")):
        raise UserError(f"{output} is a model: choose another folder for the ladder")
    for number in rungs:
        check_place(output / str(number))
    folder = data or Path("data/stickers")
    if prompts and folder.is_file():
        raise UserError(f"--data {folder}: a shard has captions, and nothing to measure by; give its folder")
    if prompts:
        check_evaluation_inputs(folder, detector, prompts, scenes)
    captions, told = SHOWN, "prompts of the sheet, without data (see --data)"
    if data or folder.is_dir():
        captions, told = prompts_of(training_shards(folder), CALIBRATED_ON, 0), f"captions of {folder}"
    facts = facts_of(place, license, more)
    if (kind := kind_of(source)) not in onnx.FAMILIES:
        raise UserError(f"{source} is of the family {kind}, of which there are no bundles")
    with atomic.held(output, "written"), Progress() as progress:
        progress(f"loading {source}")
        family = load_family(source, t5=False)
        family = replace(family, name=name or family.name)
        made = parts(family)
        progress("tracing")
        traced = {stem: trace(part) for stem, part in made.items()}
        inputs = calibrate(family, made, captions, partial(progress, f"calibrating on {told}"))
        weights = _weights(family, made, inputs, progress)
        given = {number: allocate_bits(weights, number) for number in rungs if number < FULL}
        for number in rungs:
            progress(f"writing {number} bits")
            choose = _chosen(weights, given.get(number, ()), inputs)
            with write_errors(output / str(number)):
                onnx.write_traced(family, traced, output / str(number), number, facts, choose)
        note = json.dumps(_plain(weights, given), indent=1) + "\n"
        atomic.write(output / "sensitivity.json", note.encode())
        figures = _figures(
            output, rungs, family.steps, prompts, images_per_prompt, scenes, detector, folder, progress
        )
        progress("timing")
        report = _report(output, rungs, figures, weights, given, rounds, f"{len(captions)} {told}")
        atomic.write(output / "report.md", report.encode())
    emit(str(output / "report.md"))


def _weights(
    family: Family,
    made: Mapping[str, GraphSpec],
    inputs: Mapping[tuple[str, str], CalibrationStats],
    progress: Progress,
) -> list[WeightSensitivity]:
    from fewstep.export.common.sensitivity import reference_outputs, sensitivity

    outcome = reference_outputs(family, made, SHOWN[:MEASURED_ON])
    found: list[WeightSensitivity] = []
    for stem, part in made.items():
        its = {name: each for (graph, name), each in inputs.items() if graph == stem}
        found += sensitivity(
            stem, part.module, outcome[stem], partial(progress, f"measuring the weights of {stem}"), its
        )
    return found


def _chosen(
    weights: Sequence[WeightSensitivity],
    bits: Sequence[int],
    inputs: Mapping[tuple[str, str], CalibrationStats],
) -> Choose | None:
    """How the weights of a rung are stored; ``None`` for a rung in which all are alike."""
    from fewstep.export.common.onnx_quantize import QuantSpec
    from fewstep.export.common.sensitivity import digest

    if not bits:
        return None
    chosen = {
        each.digest: QuantSpec(b, inputs.get((each.graph, each.name)))
        for each, b in zip(weights, bits, strict=True)
    }

    def choose(array: np.ndarray) -> QuantSpec | None:
        choice = chosen.get(digest(array))
        if choice is None:
            say(f"a weight {array.shape} of the graphs was not measured and has the rung's bits")
        return choice

    return choose


def _figures(
    output: Path,
    rungs: Sequence[int],
    steps: int,
    prompts: int,
    pictures: int,
    scenes: int,
    detector: Path,
    data: Path,
    progress: Progress,
) -> dict[int, Mapping[str, Any]]:
    """Retrieval, scene score and KID to 16 bits of every rung; nothing without prompts."""
    if not prompts:
        return {}
    from fewstep.evaluate.candidates import Spec, candidate
    from fewstep.evaluate.run import evaluate
    from fewstep.pocket import stickers
    from fewstep.pocket.geneval import load

    candidates = {number: candidate(Spec(str(output / str(number)), steps)) for number in rungs}
    results = evaluate(
        list(candidates.values()),
        stickers.references(data),
        output / "measured",
        teacher=candidates[FULL].label,
        prompts=prompts,
        seeds=pictures,
        scenes=load(data, detector, scenes) if scenes else None,
        shared=data / "features",
        on_progress=lambda label, done, total: progress(f"measuring {label}", done, total),
    )
    by_label = {row.label: row.figures for row in results.rows}
    return {number: by_label[each.label] for number, each in candidates.items()}


def _report(
    output: Path,
    rungs: Sequence[int],
    figures: Mapping[int, Mapping[str, Any]],
    weights: Sequence[WeightSensitivity],
    given: Mapping[int, Sequence[int]],
    rounds: int,
    calibration: str,
) -> str:
    from fewstep.evaluate.report import cell
    from fewstep.pipeline.loading import load
    from fewstep.runtime.bundle import read

    pipes = {number: load(output / str(number)) for number in rungs}
    seconds, drawn = _timed(pipes, rounds), {number: _drawn(pipe) for number, pipe in pipes.items()}
    _sheet(drawn, output / "sheet.png")
    titles = ["bits", "MB", "% of 16 bit", "a picture, s", "PSNR to 16 bit, dB"]
    titles += [title for title, *_ in COLUMNS] if figures else []
    lines = [titles, ["---:"] * len(titles)]
    size = {number: read(output / str(number)).size for number in rungs}
    for number in rungs:
        row = [str(number), f"{size[number] / 1e6:.1f}", f"{100 * size[number] / size[FULL]:.0f}"]
        row += [
            f"{seconds[number]:.3f}",
            "" if number == FULL else f"{psnr(drawn[FULL], drawn[number]):.1f}",
        ]
        row += [cell(figures[number].get(name), scale) for _, name, scale in COLUMNS] if figures else []
        lines.append(row)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [
        f"# {pipes[FULL].model.name} in fewer bits",
        f"A picture is timed warm, the rungs in turn, median of {rounds}."
        + (" In brackets: 95% confidence intervals, paired over prompts." if figures else "")
        + f" Calibrated on {calibration}.",
        table,
    ]
    parts += ["## Where the bits go", "Bits a weight, on average.", _spread(weights, given)]
    parts += ["## What needs them most", _costliest(weights)]
    return "\n\n".join(parts) + "\n"


def _spread(weights: Sequence[WeightSensitivity], given: Mapping[int, Sequence[int]]) -> str:
    stems = list(dict.fromkeys(weight.graph for weight in weights))
    lines = [["rung", *stems], ["---:"] * (len(stems) + 1)]
    for number, bits in given.items():
        row = [str(number)]
        for stem in stems:
            told = [(w.size, b) for w, b in zip(weights, bits, strict=True) if w.graph == stem]
            row.append(f"{sum(size * b for size, b in told) / max(1, sum(size for size, _ in told)):.1f}")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _costliest(weights: Sequence[WeightSensitivity]) -> str:
    """The ten that move most, by element."""
    from fewstep.export.common.sensitivity import MEASURED

    change = f"squared change at {MEASURED} bits, % of the variance"
    lines = [["graph", "weight", "elements", change], ["---"] * 4]
    for weight in sorted(weights, key=lambda weight: -weight.errors[MEASURED] / weight.size)[:10]:
        lines.append([weight.graph, weight.name, str(weight.size), f"{100 * weight.errors[MEASURED]:.4f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timed(pipes: Mapping[int, Pipeline], rounds: int) -> dict[int, float]:
    """Median seconds of a picture, all rungs in turn, after one that is not counted."""
    taken: dict[int, list[float]] = {number: [] for number in pipes}
    for _ in range(rounds + 1):
        for number, pipe in pipes.items():
            begun = time.perf_counter()
            pipe(SHOWN[0], seed=0)
            taken[number].append(time.perf_counter() - begun)
    return {number: statistics.median(times[1:]) for number, times in taken.items()}


def _drawn(pipe: Pipeline) -> np.ndarray:
    """Pictures of fixed prompts and seeds, uint8 ``[N, 3, h, w]``."""
    pictures = [pipe(prompt, seed=seed)[0].convert("RGB") for seed, prompt in enumerate(SHOWN)]
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


def _sheet(drawn: Mapping[int, np.ndarray], path: Path) -> None:
    """A row a prompt, a column a rung."""
    from io import BytesIO

    from fewstep.images.grid import sheet

    images = np.stack([pictures[row] for row in range(len(SHOWN)) for pictures in drawn.values()])
    labels = [f"{number} bits: {prompt}" for prompt in SHOWN for number in drawn]
    buffer = BytesIO()
    sheet(images, labels, len(drawn)).save(buffer, "PNG")
    atomic.write(path, buffer.getvalue())


def _plain(weights: Sequence[WeightSensitivity], given: Mapping[int, Sequence[int]]) -> list[dict[str, Any]]:
    return [
        asdict(weight) | {"given": {number: bits[row] for number, bits in given.items()}}
        for row, weight in enumerate(weights)
    ]
