"""``fewstep quantize``: the same model in fewer and fewer bits, and what each rung costs and saves."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter

from fewstep import files
from fewstep.recipes.parts import SHOWN, at_least, at_least_one, shares
from fewstep.types import UserError

if TYPE_CHECKING:
    from fewstep.deploy.common.sensitivity import Weight
    from fewstep.deploy.common.weights import BitsOf
    from fewstep.families import Family
    from fewstep.pipeline import Pipeline

FULL = 16
"""Bits that the others are compared with."""

SPARED = 8
"""Bits of the weights that must not have fewer."""

COLUMNS = (
    ("seen top-5, % of 16 bit", "seen_top5"),
    ("scenes, % of 16 bit", "scene"),
)


def quantize(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["-o", "--output"])],
    bits: tuple[int, ...] = (8, 6, 4),
    spare: float = 0.1,
    prompts: int = 100,
    pictures: int = 2,
    scenes: int = 60,
    detector: Path = Path("models/scene-detector"),
    data: Path = Path("data/stickers"),
    rounds: int = 10,
    license: str | None = None,
    about: Path | None = None,
) -> None:
    """Write a model as bundles of several precisions, and a report of what each costs and saves.

    Below 8 bits each weight's loss is measured on real prompts, and the costliest keep 8.

    Args:
        source: A run's folder, a diffusers folder, a hub name, or a Stability .safetensors file.
        output: Folder of the bundles, named after their bits, of report.md and sheet.png.
        bits: Of the rungs below 16.
        spare: Share of a graph's weights that keep 8 bits, below 8.
        prompts: Prompts of single stickers that are measured; 0 leaves out all that needs data.
        pictures: Pictures a prompt.
        scenes: Prompts of scenes; a multiple of 12, or 0 for none.
        detector: Folder of what finds things in scenes.
        data: Folder that `fewstep data stickers` filled.
        rounds: Pictures that are timed, of all rungs in turn.
        license: Name of the weights' licence, such as Apache-2.0.
        about: A JSON object of facts that go along.
    """
    from fewstep.deploy import onnx
    from fewstep.deploy.command import facts_of, model_of
    from fewstep.deploy.common.graphs import parts, trace
    from fewstep.source import load_family

    at_least_one(rounds=rounds, pictures=pictures)
    at_least(0, prompts=prompts, scenes=scenes)
    shares(spare=spare)
    rungs = [FULL, *sorted({number for number in bits if number != FULL}, reverse=True)]
    if odd := [number for number in rungs if number not in onnx.BITS]:
        raise UserError(f"--bits {odd[0]}: give some of {', '.join(map(str, sorted(onnx.BITS)))}")
    if prompts and not data.is_dir():
        raise UserError(f"{data}: no such folder; run fewstep data stickers, or give --prompts 0")
    facts = facts_of(place := model_of(source), license, about)
    family = load_family(place, t5=False)
    made = parts(family)
    _say("tracing")
    traced = {stem: trace(part) for stem, part in made.items()}
    costs: dict[int, dict[str, list[Weight]]] = {}
    for number in rungs:
        kept: dict[str, float] = {}
        if number < SPARED and spare:
            costs[number], kept = _costs(family, number, spare)
        _say(f"{number} bits")
        onnx.write_traced(family, traced, output / str(number), number, facts, _bits_of(kept))
    files.write(output / "sensitivity.json", (json.dumps(_plain(costs), indent=1) + "\n").encode())
    figures = _figures(output, rungs, family.steps, prompts, pictures, scenes, detector, data)
    files.write(output / "report.md", _report(output, rungs, figures, costs, rounds).encode())
    print(output / "report.md")


def _costs(family: Family, bits: int, spare: float) -> tuple[dict[str, list[Weight]], dict[str, float]]:
    """Every weight's loss by graph, and those that keep more bits, by what :func:`digest` makes of them."""
    from fewstep.deploy.common.graphs import parts
    from fewstep.deploy.common.sensitivity import real_inputs, sensitivity, spared

    made = parts(family)
    inputs = real_inputs(family, made, SHOWN)
    costs: dict[str, list[Weight]] = {}
    kept: dict[str, float] = {}
    for stem, part in made.items():
        _say(f"{bits} bits: what each weight of {stem} loses")
        costs[stem] = sensitivity(part, inputs[stem], bits)
        kept |= spared(costs[stem], spare)
    return costs, kept


def _bits_of(kept: Mapping[str, float]) -> BitsOf:
    from fewstep.deploy.common.sensitivity import digest

    def bits_of(array: np.ndarray) -> int | None:
        return SPARED if digest(array) in kept else None

    return bits_of


def _figures(
    output: Path,
    rungs: Sequence[int],
    steps: int,
    prompts: int,
    pictures: int,
    scenes: int,
    detector: Path,
    data: Path,
) -> dict[int, Mapping[str, Any]]:
    """Retrieval, scene score and KID to 16 bits of every rung; nothing without prompts."""
    if not prompts:
        return {}
    from fewstep.data import stickers
    from fewstep.evaluate.command import Spec, candidate
    from fewstep.evaluate.harness import evaluate
    from fewstep.evaluate.scenes import load

    names = {number: f"{output / str(number)}@{steps}" for number in rungs}
    results = evaluate(
        [candidate(Spec(str(output / str(number)), steps)) for number in rungs],
        stickers.references(data),
        output / "measured",
        teacher=names[FULL],
        prompts=prompts,
        seeds=pictures,
        scenes=load(data, detector, scenes) if scenes else None,
        shared=data / "features",
        on_progress=lambda label, done, total: None if done else _say(f"measuring {label}"),
    )
    by_label = {row.label: row.figures for row in results.rows}
    return {number: by_label[name] for number, name in names.items()}


def _report(
    output: Path,
    rungs: Sequence[int],
    figures: Mapping[int, Mapping[str, Any]],
    costs: Mapping[int, Mapping[str, Sequence[Weight]]],
    rounds: int,
) -> str:
    from fewstep.runtime.bundle import read
    from fewstep.source import load

    pipes = {number: load(output / str(number)) for number in rungs}
    _say("timing")
    seconds, drawn = _timed(pipes, rounds), {number: _drawn(pipe) for number, pipe in pipes.items()}
    _sheet(drawn, output / "sheet.png")
    titles = ["bits", "MB", "% of 16 bit", "a picture, s", "PSNR to 16 bit, dB"]
    titles += [*(title for title, _ in COLUMNS), "KID to 16 bit × 1000"] if figures else []
    lines = [titles, ["---:"] * len(titles)]
    size = {number: read(output / str(number)).size for number in rungs}
    for number in rungs:
        row = [str(number), f"{size[number] / 1e6:.1f}", f"{100 * size[number] / size[FULL]:.0f}"]
        row += [
            f"{seconds[number]:.3f}",
            "" if number == FULL else f"{_psnr(drawn[FULL], drawn[number]):.1f}",
        ]
        row += _told(figures[number], figures[FULL]) if figures else []
        lines.append(row)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    parts = [
        f"# {pipes[FULL].model.name} in fewer bits",
        f"A picture is timed warm, the rungs in turn, median of {rounds}.",
        table,
    ]
    for number, graphs in costs.items():
        parts += [f"## What must not have {number} bits", _costliest(graphs)]
    return "\n\n".join(parts) + "\n"


def _told(own: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    cells: list[str] = []
    for _, name in COLUMNS:
        whole = full[name].value if name in full else 0
        cells.append(f"{100 * own[name].value / whole:.1f}" if whole else "")
    kid = own.get("kid_teacher")
    return [*cells, "" if kid is None else f"{1000 * kid.value:.2f}"]


def _costliest(graphs: Mapping[str, Sequence[Weight]]) -> str:
    lines = [["graph", "weight", "elements", "squared change of the output, % of its square"], ["---"] * 4]
    for stem, weights in graphs.items():
        for weight in sorted(weights, key=lambda weight: -weight.error)[:3]:
            lines.append([stem, weight.name, str(weight.size), f"{100 * weight.error:.3f}"])
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


def _psnr(whole: np.ndarray, ours: np.ndarray) -> float:
    error = float(np.square(whole.astype(np.float64) - ours).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _sheet(drawn: Mapping[int, np.ndarray], path: Path) -> None:
    """A row a prompt, a column a rung."""
    from io import BytesIO

    from fewstep.evaluate.sheet import sheet

    images = np.stack([pictures[row] for row in range(len(SHOWN)) for pictures in drawn.values()])
    labels = [f"{number} bits: {prompt}" for prompt in SHOWN for number in drawn]
    buffer = BytesIO()
    sheet(images, labels, len(drawn)).save(buffer, "PNG")
    files.write(path, buffer.getvalue())


def _plain(costs: Mapping[int, Mapping[str, Sequence[Weight]]]) -> dict[str, Any]:
    return {
        str(number): {stem: [asdict(weight) for weight in weights] for stem, weights in graphs.items()}
        for number, graphs in costs.items()
    }


def _say(line: str) -> None:
    print(f"fewstep: {line}", file=sys.stderr)
