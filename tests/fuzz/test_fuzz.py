"""Every format that is read, made wrong in all ways: it is read, or refused in one line. Nothing else.

``FEWSTEP_FUZZ=300 pytest tests/fuzz`` tries 300 files of each format; without it there are a few. The cases
are the same each time. All run in this process, whose memory may grow by 2 GiB; a case has 30 s.
"""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fewstep
from fewstep.cli.app import run
from fewstep.core.types import UserError
from mutated import broken, documents

pytestmark = pytest.mark.slow(10)

CASES = int(os.environ.get("FEWSTEP_FUZZ", "0"))
SECONDS = 30
"""Of a case."""
ROOM = 2 * 2**30
"""Bytes by which memory may grow."""


@dataclass(frozen=True)
class Format:
    """A format: a folder with valid files, those that are made wrong, and who reads them.

    Attributes:
        folder: where all lies.
        names: of the files.
        read: reads them; raises :class:`UserError` alone.
        made: after a file was changed, what makes the others fit to it again.
    """

    folder: Path
    names: tuple[str, ...]
    read: Callable[[], object]
    made: Callable[[], object] = lambda: None

    def check(self, few: int) -> None:
        """Try ``few`` files, or as many as were asked for."""
        valid = {name: (self.folder / name).read_bytes() for name in self.names}
        told, faults = Counter[str](), dict[str, str]()
        self.read()  # what is valid is read

        @settings(
            max_examples=CASES or few,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def tried(data: Any) -> None:
            name = data.draw(st.sampled_from(sorted(valid)))
            wrong = data.draw(_wrong(name, valid[name]))
            try:
                put(self.folder / name, wrong)
                self.made()
                begun = time.monotonic()
                told[_outcome(self.read)] += 1
                assert time.monotonic() - begun < SECONDS, "it took too long"
            except BaseException as error:  # a panic of a library in Rust among them
                where = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"{type(error).__name__} {str(error)[:200]} at {where.filename}:{where.lineno}"
                faults.setdefault(f"{name}: {fault}", repr(wrong[:2000]))
            finally:
                put(self.folder / name, valid[name])
                self.made()

        tried()
        print(f"{sum(told.values())} cases: {dict(told)}")
        assert not faults, "\n".join(f"{fault}\n    {wrong}" for fault, wrong in faults.items())


def put(path: Path, data: bytes) -> None:
    """A new file in the old one's place, which somebody may still have mapped."""
    fresh = path.with_name(f".fresh-{path.name}")
    fresh.write_bytes(data)
    fresh.replace(path)


def _wrong(name: str, valid: bytes) -> st.SearchStrategy[bytes]:
    if name.endswith(("json", ".index.json")):
        return documents(json.loads(valid))
    if name.endswith(".jsonl"):
        return st.one_of(
            broken(valid), documents(json.loads(valid.splitlines()[0])).map(lambda line: line + b"\n")
        )
    if name.endswith(".safetensors"):
        size = int.from_bytes(valid[:8], "little")
        header = documents(json.loads(valid[8 : 8 + size]))
        whole = header.map(lambda text: len(text).to_bytes(8, "little") + text + valid[8 + size :])
        return st.one_of(whole, whole, broken(valid), broken(valid[: 8 + size]))
    return broken(valid)


def _outcome(read: Callable[[], object]) -> str:
    try:
        status = read()
    except UserError as error:
        assert "\n" not in str(error), str(error)
        return "refused"
    assert status in (None, 0, 2), status
    return "refused" if status == 2 else "read"


@pytest.fixture(autouse=True)
def bounded() -> Generator[None]:
    """Memory that may be asked for; warnings of libraries are no failure here."""
    status = Path("/proc/self/status")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if status.exists():
        held = int(
            next(line for line in status.read_text().splitlines() if line.startswith("VmSize")).split()[1]
        )
        resource.setrlimit(resource.RLIMIT_AS, (held * 1024 + ROOM, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def generate(*words: str) -> Callable[[], int]:
    return lambda: run(["generate", *words])


def reseal(folder: Path, **changes: Any) -> Callable[[], object]:
    """Hashes that fit, so that what comes behind them is reached."""
    from fewstep.runtime.bundle import MANIFEST

    facts = json.loads((folder / MANIFEST).read_text())

    def made() -> None:
        import hashlib

        files = {
            path.name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for path in folder.iterdir()
            if path.name in facts["files"] and (data := path.read_bytes()) is not None
        }
        (folder / MANIFEST).write_text(json.dumps({**facts, **changes, "files": files}))

    return made


def test_bundle_json(tmp_path: Path) -> None:
    from tiny_bundle import write_bundle

    write_bundle(tmp_path / "b")
    drawn = generate("a cat", "--model", str(tmp_path / "b"), "-o", str(tmp_path / "x.png"), "--threads", "1")
    Format(tmp_path / "b", ("bundle.json",), drawn).check(40)


def test_tokenizer_json(tmp_path: Path) -> None:
    from tiny_bundle import write_bundle

    write_bundle(tmp_path)

    def read() -> None:
        fewstep.load(tmp_path, threads=1)("a red apple, 3D " * 9)

    Format(tmp_path, ("tokenizer.json",), read, reseal(tmp_path)).check(40)


@pytest.mark.parametrize("sealed", [True, False])
def test_onnx(tmp_path: Path, sealed: bool) -> None:
    from tiny_bundle import write_bundle

    write_bundle(tmp_path)
    names = ("decoder.onnx", "modulation.onnx", "text.onnx", "transformer.onnx")
    made = reseal(tmp_path) if sealed else lambda: None
    Format(tmp_path, names, lambda: fewstep.load(tmp_path, threads=1)("a cat") and None, made).check(30)


def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from tiny_bundle import write_openvino_bundle

    write_openvino_bundle(tmp_path)
    names = tuple(f"{stem}.{end}" for stem in ("decoder", "transformer", "text") for end in ("xml", "bin"))
    Format(
        tmp_path, names, lambda: fewstep.load(tmp_path, threads=1)("a cat") and None, reseal(tmp_path)
    ).check(10)


PLAN: dict[str, Any] = {
    "layout": 1, "teacher": "t", "weights": "w", "text": "x", "dtype": "float32", "t5": True, "guidance": 4.5,
    "steps": 4, "student_steps": 2, "shift": 3.0, "seed": 0, "number": 5, "captions": "c", "per_shard": 3,
    "pictures": False, "latent": [2, 4, 4], "context": [3, 6], "pooled": 5, "clip_length": 2,
}  # fmt: skip


def _npy(*shape: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(shape, np.float16))
    return file.getvalue()


def write_samples(folder: Path) -> None:
    from fewstep.data import shards

    (folder / "plan.json").write_text(json.dumps(PLAN))
    np.savez(folder / "null.npz", context=np.ones((1, 3, 6), np.float16), pooled=np.ones((1, 5), np.float16))
    for shard, rows in enumerate((range(3), range(3, 5))):
        with tarfile.open(folder / f"synthetic-{shard:05d}.tar", "w") as tar:
            for row in rows:
                shards.add_file(tar, f"{row:08d}.txt", b"a cat")
                for kind, data in (
                    ("states", _npy(3, 2, 4, 4)),
                    ("context", _npy(3, 6)),
                    ("pooled", _npy(5)),
                ):
                    shards.add_file(tar, f"{row:08d}.{kind}.npy", data)


@pytest.mark.parametrize(
    "names", [("plan.json",), ("null.npz", "synthetic-00000.tar", "synthetic-00001.tar")]
)
def test_samples(tmp_path: Path, names: tuple[str, ...]) -> None:
    from fewstep.data.teacher_samples.read import TeacherSamples

    write_samples(tmp_path)

    def read() -> None:
        samples = TeacherSamples.open(tmp_path)
        samples.read([0, len(samples) - 1])

    Format(tmp_path, names, read).check(100)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import tiny
    import tiny_flux
    from fewstep.families import flux, sd3

    folder = tmp_path_factory.mktemp("models")
    sd3.save(sd3.assemble(tiny.parts(), name="base", steps=2, guidance=None), folder / "sd3")
    flux.save(flux.assemble(tiny_flux.parts("schnell"), name="base", steps=2), folder / "flux")
    return {kind: folder / kind for kind in ("sd3", "flux")}


CONFIGS = (
    "model_index.json",
    "fewstep.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
WEIGHTS = tuple(
    f"{part}/{'diffusion_pytorch_model' if part in ('transformer', 'vae') else 'model'}.safetensors"
    for part in ("transformer", "vae", "text_encoder")
)


def _there(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if (folder / name).is_file())


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("names", [CONFIGS, WEIGHTS], ids=["configs", "weights"])
def test_diffusers_folder(models: dict[str, Path], tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    folder = models[kind]
    words = ("a cat", "--model", str(folder), "--steps", "1", "-o", str(tmp_path / "x.png"))
    Format(folder, _there(folder, names), generate(*words)).check(8)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("names", [CONFIGS, WEIGHTS], ids=["configs", "weights"])
def test_family_of_a_folder(models: dict[str, Path], kind: str, names: tuple[str, ...]) -> None:
    from fewstep.pipeline.loading import load_family

    def read() -> None:
        family = load_family(str(models[kind]))
        family.text(["a cat"])

    Format(models[kind], _there(models[kind], names), read).check(8)


def test_lora(models: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from fewstep.families import sd3

    net = sd3.load(models["sd3"]).net
    tensors: dict[str, Any] = {}
    for path, layer in net.named_modules():
        if path.endswith("to_q"):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.ones(2, layer.in_features)
            tensors[f"transformer.{path}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "fewstep.json").write_text(
        json.dumps({"name": "s", "steps": 1, "sampler": "euler", "t5": True})
    )
    words = (
        "a cat",
        "--model",
        str(models["sd3"]),
        "--student",
        str(tmp_path),
        "-o",
        str(tmp_path / "x.png"),
    )
    Format(tmp_path, ("pytorch_lora_weights.safetensors", "fewstep.json"), generate(*words)).check(8)


def test_single_file(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from fewstep.export.common.sd3_keys import checkpoint
    from fewstep.families import sd3
    from fewstep.families.diffusers_io import torch_dtype
    from fewstep.families.single_file import read_single

    path = tmp_path / "one.safetensors"
    tensors = checkpoint(sd3.load(models["sd3"]).parts)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        path,
        {"format": "pt", "fewstep": '{"steps": 2}'},
    )
    read = lambda: read_single(sd3.ARCHITECTURE, path, models["sd3"], torch_dtype("float32"), None) and None  # noqa: E731
    Format(tmp_path, ("one.safetensors",), read).check(6)


def test_run_folder(tmp_path: Path) -> None:
    from fewstep.train import checkpoint, run_owner
    from fewstep.train.best_checkpoint import read
    from fewstep.train.log import Log

    about = {"recipe": "r", "made_of": {"teacher": "t"}, "device": "cpu", "versions": {"torch": "2"}}
    line = {"step": 1, "time": 1.0, "loss": float("nan")}
    (tmp_path / "best").mkdir()
    step = tmp_path / "checkpoints" / "00000003"
    step.mkdir(parents=True)
    (step / "a").write_bytes(b"xy")
    (step / "whole.json").write_text(json.dumps({"step": 3, "files": {"a": 2}}))
    (tmp_path / "best" / "best.json").write_text(json.dumps({"step": 1, "metric": "m", "value": 0.5}))
    (tmp_path / "run.json").write_text(json.dumps(about))
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "step": 2}) + "\n")

    def go_on() -> None:
        run_owner.check_owner(tmp_path, about)
        checkpoint.last_step(tmp_path)
        read(tmp_path)
        kept = {name: (tmp_path / name).read_bytes() for name in ("run.json", "log.jsonl")}
        try:
            Log(tmp_path, "r", about, 2).close()
        finally:
            for name, data in kept.items():
                (tmp_path / name).write_bytes(data)

    names = ("run.json", "log.jsonl", "best/best.json", "checkpoints/00000003/whole.json")
    Format(tmp_path, names, go_on).check(100)


def test_shards(tmp_path: Path) -> None:
    from PIL import Image

    from fewstep.data import shards
    from fewstep.data.captions import truths_of

    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    truth = {"prompt": "a cat", "objects": [{"concept": "cat", "style": "3d"}], "ground": "white"}
    shards.write_shard(tmp_path / "a-00000.tar", ((f"{i}", image, "a cat", truth) for i in range(3)))

    def read() -> None:
        path = tmp_path / "a-00000.tar"
        list(shards.read(path))
        list(truths_of([path]))

    Format(tmp_path, ("a-00000.tar",), read).check(100)


def test_facts_in_a_shard(tmp_path: Path) -> None:
    from fewstep.data import shards
    from fewstep.pocket.concepts import Concept
    from fewstep.pocket.labelled_captions import load

    truth = {"prompt": "a cat", "objects": [{"concept": "cat", "style": "3d"}], "ground": "white"}
    (tmp_path / "x.json").write_text(json.dumps(truth))

    def pack() -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            shards.add_file(tar, "x.json", (tmp_path / "x.json").read_bytes())

    pack()
    cats = [Concept("cat", ("kitty",), (), "1", "animal", ("3d",))]
    Format(
        tmp_path, ("x.json",), lambda: load([tmp_path / "a.tar"], 9, cats, ["w"]).label_table() is None, pack
    ).check(100)


def test_renderings(tmp_path: Path) -> None:
    from fewstep.pocket import render

    concept = {
        "name": "cat",
        "synonyms": ["kitty"],
        "tags": [],
        "code": "1",
        "group": "animal",
        "styles": ["3d"],
    }
    told = {"concepts": [concept], "pairs": [[0, "3d"]], "size": 8}
    (tmp_path / "renderings-8.json").write_text(json.dumps(told))
    np.save(tmp_path / "renderings-8.npy", np.zeros((1, 8, 8, 4), np.uint8))
    names = ("renderings-8.json", "renderings-8.npy")
    Format(tmp_path, names, lambda: render.load(tmp_path, 8) and None).check(100)


@pytest.mark.parametrize("end", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_images(tmp_path: Path, end: str) -> None:
    from PIL import Image

    from fewstep.images import io as image_io
    from fewstep.images.pixels import center_crop_resize

    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.int64).reshape(32, 32, 3).astype(np.uint8))
    image.save(tmp_path / f"x.{end}")
    path = tmp_path / f"x.{end}"
    Format(
        tmp_path,
        (path.name,),
        lambda: center_crop_resize(image_io.open_image(path), (16, 16)) is None,
    ).check(20)


def test_record_of_an_image(tmp_path: Path) -> None:
    from tiny_bundle import write_bundle

    write_bundle(tmp_path / "b")
    pipe = fewstep.load(tmp_path / "b", threads=1)
    image = pipe("a cat", seed=1)[0]
    fewstep.save(image, tmp_path / "x.png")
    (tmp_path / "record.json").write_text(image.info["fewstep"])

    def stamped() -> None:
        image.info["fewstep"] = (
            (tmp_path / "record.json").read_bytes().decode("utf-8", "replace").replace("\0", " ")
        )
        fewstep.save(image, tmp_path / "x.png")

    def read() -> int:
        out = tmp_path / "y.png"
        return max(
            run(["show", str(tmp_path / "x.png")]),
            run(["generate", "--from", str(tmp_path / "x.png"), "-o", str(out)]),
        )

    Format(tmp_path, ("record.json",), read, stamped).check(20)


def test_prompts(tmp_path: Path) -> None:
    from tiny_bundle import write_bundle

    write_bundle(tmp_path / "b")
    (tmp_path / "p.txt").write_text("a cat\na dog on a hill\n")
    words = (
        "--prompts",
        str(tmp_path / "p.txt"),
        "--model",
        str(tmp_path / "b"),
        "-o",
        str(tmp_path / "out"),
    )

    def read() -> int:
        status = run(["generate", *words])
        for path in (tmp_path / "out").glob("*"):
            path.unlink()
        return status

    Format(tmp_path, ("p.txt",), read).check(20)


def test_notes_of_trainings(tmp_path: Path) -> None:
    from fewstep.experiments.report import document, read_results
    from fewstep.experiments.subprocesses import read_cost

    run_ = tmp_path / "a.4.0"
    run_.mkdir()
    (run_ / "cost.json").write_text(
        json.dumps({"command": ["x"], "seconds": 60.0, "bytes": 1e8, "cut": True})
    )
    (run_ / "merge.json").write_text(
        json.dumps({"metric": "kid", "late": 0.5, "curve": [[0.0, 3.0], [1.0, 2.0]]})
    )
    figure = {"value": 0.5, "low": 0.1, "high": None, "without": [0.1, 0.2]}
    rows = [{"label": label, "figures": {"kid_teacher": figure}} for label in ("T@28", f"{run_ / 'model'}@4")]
    results = {
        "rows": rows,
        "teacher": "T@28",
        "seen": 4,
        "held_out": 4,
        "seeds": 2,
        "scenes": 12,
        "extractor": "x",
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    facts = {"compute": "9", "machine": "m", "jobs": "1", "command": "fewstep"}

    def read() -> None:
        read_cost(run_ / "cost.json")
        document([("A", 4, run_)], read_results(tmp_path / "results.json"), facts)

    Format(tmp_path, ("a.4.0/cost.json", "a.4.0/merge.json", "results.json"), read).check(100)


def test_files_of_fashion_mnist(tmp_path: Path) -> None:
    import gzip

    from fewstep.fashion.data import read_idx

    header = np.array([0x803, 2, 28, 28], ">u4").tobytes()
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + bytes(2 * 28 * 28), mtime=0))

    def read() -> None:
        read_idx(tmp_path / "images.gz", 0x803, (2, 28, 28))

    Format(tmp_path, ("images.gz",), read).check(50)


def test_results_of_the_benchmark(tmp_path: Path) -> None:
    from fewstep.experiments.fashion import report
    from fewstep.experiments.fashion.cells import read_results

    made_of = {"row": "a", "student_steps": 4, "replicate": 0, "choice": False, "rate": 1e-4}
    point = {"update": 100, "images": 10, "figures": {"frechet": {"value": 1.5, "error": 0.5}}}
    (tmp_path / "a.json").write_text(json.dumps({"made_of": made_of, "curve": [point], "passes": 3.0}))

    def read() -> None:
        results = read_results(tmp_path)
        report.table(results, ["a"], 4, "b")
        report.curves(results, ["a"], 4)

    Format(tmp_path, ("a.json",), read).check(50)


def test_records_of_bench(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fewstep.bench import plot

    record = {
        "model": "pocket", "engine": "fewstep onnx", "bits": 8, "steps": 4, "batch": 1, "peak": 3e8,
        "guidance": None, "seconds": {"whole": [0.1, 0.1, 0.1]}, "floor": {"steps": 0.05}, "threads": 0,
        "device": {"processor": "a", "cores": 2},
    }  # fmt: skip
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "r.json").write_text(
        json.dumps({"rows": [{"label": "pocket@4", "figures": {"kid": {"value": 0.5}}}]})
    )

    def read() -> None:
        found = plot.read([tmp_path / "b.jsonl"])
        scores = plot.scores_of(tmp_path / "r.json", "kid")
        plot.latency(found, tmp_path / "l.png")
        plot.quality(found, scores, "kid", tmp_path / "q.png")

    Format(tmp_path, ("b.jsonl", "r.json"), read).check(20)


def test_detector_of_scenes(tmp_path: Path) -> None:
    from fewstep.pocket.detector import BoxDetector

    source = Path(fewstep.__file__).parents[2] / "models" / "scene-detector"
    for name in ("detector.json", "detector.onnx"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    image = np.zeros((1, 3, 64, 64), np.uint8)
    Format(tmp_path, ("detector.json", "detector.onnx"), lambda: BoxDetector(tmp_path)(image) is None).check(
        8
    )
