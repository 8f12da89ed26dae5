"""``fewstep quantize``: a model in several precisions, with a report of their quality, size and speed."""

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
from fewstep.pocket.evaluation_inputs import check_evaluation_inputs, check_prompt_counts
from fewstep.train.preview import SHOWN

if TYPE_CHECKING:
    from fewstep.export.common.calibration import CalibrationStats
    from fewstep.export.common.graphs import GraphSpec
    from fewstep.export.common.onnx_quantize import Choose
    from fewstep.export.common.sensitivity import WeightSensitivity
    from fewstep.families.base import Family
    from fewstep.pipeline.pipeline import Pipeline

FULL = 16
"""Bits of the reference precision."""

SENSITIVITY_PROMPTS = 4
"""Prompts on which the sensitivity of weights is measured."""

CALIBRATION_PROMPTS = 256
"""Captions of the data set that are sampled to record the inputs of each weight. On Pocket in 4 bits, 12, 32,
128 and 384 captions gain 2.0, 2.5, 3.4 and 3.5 dB."""

COLUMNS = (
    ("seen top-5, % of 16 bit", "seen_top5_ratio", 100),
    ("held-out top-5, % of 16 bit", "held_out_top5_ratio", 100),
    ("scenes, % of 16 bit", "scene_ratio", 100),
    ("KID to 16 bit × 1000", "kid_teacher", 1000),
)
"""Figures of a precision's images: title, key, scale."""


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
    """Write a model as bundles of several precisions, and a report of their quality, size and speed.

    The bits of a precision are an average: the sensitivity of each weight is measured on prompts, and the
    most sensitive weights get the most bits.

    Args:
        source: A run's folder, a diffusers folder, a hub name, or a Stability .safetensors file.
        output: Folder for the bundles, named by their bits, and report.md, sheet.png and sensitivity.json;
            those of an earlier run are replaced.
        bits: Precisions to write besides 16.
        prompts: Prompts of single stickers to evaluate; 0 leaves out all figures of them and of scenes.
        images_per_prompt: Images per prompt.
        scenes: Prompts of scenes; a multiple of 12, or 0 for none.
        detector: Folder of the scene detector.
        data: Folder that `fewstep data stickers` filled, by default data/stickers. Its captions are used for
            calibration; without it the prompts of the contact sheet are.
        rounds: Images to time per precision, all precisions in turn.
        name: The model's name; by default the source's own.
        license: Name of the weights' licence, such as Apache-2.0.
        metadata: File of a JSON object that is added to the bundles.
    """
    from fewstep.core.optional import need
    from fewstep.data.captions import prompts_of
    from fewstep.export import onnx
    from fewstep.export.common.bundle import check_place
    from fewstep.export.common.graphs import parts, trace
    from fewstep.export.common.output_paths import check_folder, write_errors
    from fewstep.export.common.sensitivity import allocate_bits, calibrate
    from fewstep.export.metadata import read_metadata, source_metadata
    from fewstep.pipeline.loading import kind_of, load_family
    from fewstep.pipeline.resolve import parse_family, resolve

    require_positive(rounds=rounds, images_per_prompt=images_per_prompt)
    require_at_least(0, prompts=prompts, scenes=scenes)
    if prompts:
        check_prompt_counts(prompts, scenes)
    extra = read_metadata(metadata)
    precisions, possible = [FULL, *sorted(set(bits), reverse=True)], sorted(b for b in onnx.BITS if b < FULL)
    if unknown := [number for number in precisions[1:] if number not in possible]:
        raise UserError(
            f"--bits {unknown[0]}: give some of {', '.join(map(str, possible))}; {FULL} is always written"
        )
    need("torch", "diffusers", "transformers")
    need(*onnx.needs(FULL))
    check_folder(output)
    folder_of_source = resolve(parse_family(source)[1])
    if any((output / index).exists() for index in ("model_index.json", "bundle.json")):
        raise UserError(f"{output} is a model: choose another folder")
    for number in precisions:
        check_place(output / str(number))
    folder = data or Path("data/stickers")
    if prompts and folder.is_file():
        raise UserError(f"--data {folder}: a shard alone has nothing to evaluate with; give its folder")
    if prompts:
        check_evaluation_inputs(folder, detector, prompts, scenes)
    captions, source_of_captions = SHOWN, "prompts of the contact sheet, without data (see --data)"
    if data or folder.is_dir():
        captions = prompts_of(training_shards(folder), CALIBRATION_PROMPTS, 0)
        source_of_captions = f"captions of {folder}"
    facts = source_metadata(folder_of_source, license, extra)
    if (kind := kind_of(source)) not in onnx.FAMILIES:
        raise UserError(f"{source} is of the family {kind}, of which there are no bundles")
    with atomic.held(output, "written"), Progress() as progress:
        progress(f"loading {source}")
        family = load_family(source, t5=False)
        family = replace(family, name=name or family.name)
        graphs = parts(family)
        progress("tracing")
        traced = {stem: trace(part) for stem, part in graphs.items()}
        inputs = calibrate(
            family, graphs, captions, partial(progress, f"calibrating on {source_of_captions}")
        )
        weights = _sensitivities(family, graphs, inputs, progress)
        allocations = {number: allocate_bits(weights, number) for number in precisions if number < FULL}
        for number in precisions:
            progress(f"writing {number} bits")
            choose = _chooser(weights, allocations.get(number, ()), inputs)
            with write_errors(output / str(number)):
                onnx.write_traced(family, traced, output / str(number), number, facts, choose)
        note = json.dumps(_sensitivity_record(weights, allocations), indent=1) + "\n"
        atomic.write(output / "sensitivity.json", note.encode())
        figures = _figures(
            output, precisions, family.steps, prompts, images_per_prompt, scenes, detector, folder, progress
        )
        progress("timing")
        report = _report(
            output, precisions, figures, weights, allocations, rounds, f"{len(captions)} {source_of_captions}"
        )
        atomic.write(output / "report.md", report.encode())
    emit(str(output / "report.md"))


def _sensitivities(
    family: Family,
    graphs: Mapping[str, GraphSpec],
    inputs: Mapping[tuple[str, str], CalibrationStats],
    progress: Progress,
) -> list[WeightSensitivity]:
    from fewstep.export.common.sensitivity import reference_outputs, sensitivity

    references = reference_outputs(family, graphs, SHOWN[:SENSITIVITY_PROMPTS])
    sensitivities: list[WeightSensitivity] = []
    for stem, part in graphs.items():
        own_inputs = {name: stats for (graph, name), stats in inputs.items() if graph == stem}
        sensitivities += sensitivity(
            stem,
            part.module,
            references[stem],
            partial(progress, f"measuring the weights of {stem}"),
            own_inputs,
        )
    return sensitivities


def _chooser(
    weights: Sequence[WeightSensitivity],
    bits: Sequence[int],
    inputs: Mapping[tuple[str, str], CalibrationStats],
) -> Choose | None:
    """Return how each weight of a precision is stored; ``None`` if all are stored alike."""
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
            say(f"a weight {array.shape} of the graphs was not measured and has the average bits")
        return choice

    return choose


def _figures(
    output: Path,
    precisions: Sequence[int],
    steps: int,
    prompts: int,
    images_per_prompt: int,
    scenes: int,
    detector: Path,
    data: Path,
    progress: Progress,
) -> dict[int, Mapping[str, Any]]:
    """Return retrieval, scene score and KID to 16 bits of every precision; nothing without prompts."""
    if not prompts:
        return {}
    from fewstep.evaluate.candidates import Spec, candidate
    from fewstep.evaluate.run import evaluate
    from fewstep.pocket import stickers
    from fewstep.pocket.geneval import load
    from fewstep.pocket.prompt_sets import pocket

    candidates = {number: candidate(Spec(str(output / str(number)), steps)) for number in precisions}
    results = evaluate(
        list(candidates.values()),
        pocket.build(
            stickers.references(data),
            prompts,
            scenes=load(data, detector, scenes) if scenes else None,
            cache=data / "features",
        ),
        output / "measured",
        teacher=candidates[FULL].label,
        seeds=images_per_prompt,
        on_progress=lambda label, done, total: progress(f"evaluating {label}", done, total),
    )
    by_label = {row.label: row.figures for row in results.rows}
    return {number: by_label[each.label] for number, each in candidates.items()}


def _report(
    output: Path,
    precisions: Sequence[int],
    figures: Mapping[int, Mapping[str, Any]],
    weights: Sequence[WeightSensitivity],
    allocations: Mapping[int, Sequence[int]],
    rounds: int,
    calibration: str,
) -> str:
    from fewstep.evaluate.report import cell
    from fewstep.pipeline.loading import load
    from fewstep.runtime.bundle import read

    pipes = {number: load(output / str(number)) for number in precisions}
    seconds, images = (
        _seconds_per_image(pipes, rounds),
        {number: _drawn(pipe) for number, pipe in pipes.items()},
    )
    _write_sheet(images, output / "sheet.png")
    titles = ["bits", "MB", "% of 16 bit", "s per image", "PSNR to 16 bit, dB"]
    titles += [title for title, *_ in COLUMNS] if figures else []
    lines = [titles, ["---:"] * len(titles)]
    size = {number: read(output / str(number)).size for number in precisions}
    for number in precisions:
        row = [str(number), f"{size[number] / 1e6:.1f}", f"{100 * size[number] / size[FULL]:.0f}"]
        row += [
            f"{seconds[number]:.3f}",
            "" if number == FULL else f"{psnr(images[FULL], images[number]):.1f}",
        ]
        row += [cell(figures[number].get(name), scale) for _, name, scale in COLUMNS] if figures else []
        lines.append(row)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [
        f"# {pipes[FULL].model.name} in fewer bits",
        f"Seconds per image are measured warm, all precisions in turn, median of {rounds}."
        + (" In brackets: 95% confidence intervals, paired over prompts." if figures else "")
        + f" Calibrated on {calibration}.",
        table,
    ]
    parts += ["## Bits per weight", "Average of each graph.", _bits_table(weights, allocations)]
    parts += ["## Most sensitive weights", _most_sensitive(weights)]
    return "\n\n".join(parts) + "\n"


def _bits_table(weights: Sequence[WeightSensitivity], allocations: Mapping[int, Sequence[int]]) -> str:
    stems = list(dict.fromkeys(weight.graph for weight in weights))
    lines = [["bits", *stems], ["---:"] * (len(stems) + 1)]
    for number, bits in allocations.items():
        row = [str(number)]
        for stem in stems:
            sizes = [(w.size, b) for w, b in zip(weights, bits, strict=True) if w.graph == stem]
            row.append(f"{sum(size * b for size, b in sizes) / max(1, sum(size for size, _ in sizes)):.1f}")
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _most_sensitive(weights: Sequence[WeightSensitivity]) -> str:
    """Return a table of the ten weights with the largest squared change per element."""
    from fewstep.export.common.sensitivity import MEASURED

    change = f"squared change at {MEASURED} bits, % of the variance"
    lines = [["graph", "weight", "elements", change], ["---"] * 4]
    for weight in sorted(weights, key=lambda weight: -weight.errors[MEASURED] / weight.size)[:10]:
        lines.append([weight.graph, weight.name, str(weight.size), f"{100 * weight.errors[MEASURED]:.4f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _seconds_per_image(pipes: Mapping[int, Pipeline], rounds: int) -> dict[int, float]:
    """Return median seconds per image, all precisions in turn, after one that is not counted."""
    taken: dict[int, list[float]] = {number: [] for number in pipes}
    for _ in range(rounds + 1):
        for number, pipe in pipes.items():
            started = time.perf_counter()
            pipe(SHOWN[0], seed=0)
            taken[number].append(time.perf_counter() - started)
    return {number: statistics.median(times[1:]) for number, times in taken.items()}


def _drawn(pipe: Pipeline) -> np.ndarray:
    """Pictures of fixed prompts and seeds, uint8 ``[N, 3, h, w]``."""
    pictures = [pipe(prompt, seed=seed)[0].convert("RGB") for seed, prompt in enumerate(SHOWN)]
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


def _write_sheet(images: Mapping[int, np.ndarray], path: Path) -> None:
    """Write a contact sheet: one row per prompt, one column per precision."""
    from io import BytesIO

    from fewstep.images.grid import sheet

    cells = np.stack([column[row] for row in range(len(SHOWN)) for column in images.values()])
    labels = [f"{number} bits: {prompt}" for prompt in SHOWN for number in images]
    buffer = BytesIO()
    sheet(cells, labels, len(images)).save(buffer, "PNG")
    atomic.write(path, buffer.getvalue())


def _sensitivity_record(
    weights: Sequence[WeightSensitivity], allocations: Mapping[int, Sequence[int]]
) -> list[dict[str, Any]]:
    return [
        asdict(weight) | {"given": {number: bits[row] for number, bits in allocations.items()}}
        for row, weight in enumerate(weights)
    ]
