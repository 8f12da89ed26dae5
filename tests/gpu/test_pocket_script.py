"""``gpu/pocket.sh`` on a CPU with tiny sizes. Its slow stages ``data`` and ``export`` are left out.

The stage ``ablate`` runs a stub: tests/experiments/test_ablate.py tests the command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tests.helpers import tiny_stickers

from fewstep.cli.app import application
from fewstep.families import sd3
from fewstep.pocket import config as pocket

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "gpu" / "pocket.sh"
TINY = {
    "VAE_STEPS": "2",
    "VAE_BATCH": "2",
    "T5_STEPS": "2",
    "COMPILE": "",
    "WORDS": "20",
    "TEXT_STEPS": "2",
    "TEXT_BATCH": "8",
    "TEACHER_STEPS": "2",
    "TEACHER_BATCH": "4",
    "SAMPLES": "4",
    "SAMPLE_STEPS": "4",
    "WARM_START_STEPS": "1",
    "STUDENT_STEPS": "1",
    "SPLIT_STEPS": "1",
    "STUDENT_BATCH": "2",
    "DEVICE": "cpu",
}

NET = ("./transformer/diffusion_pytorch_model.safetensors",)
LOGS = ("./log.jsonl", "./run.json")
ARCHIVED = {
    "text": [
        *LOGS,
        *(f"./{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")),
        *(f"./{part}/tokenizer.json" for part in ("tokenizer", "tokenizer_2")),
    ],
    "t5-text": [*LOGS, "./text_encoder_3/model.safetensors"],
    "vae": [*LOGS, "./vae/diffusion_pytorch_model.safetensors"],
    "teacher": [*LOGS, *NET],
    "warm-start": [*LOGS, *NET],
    "student": [*NET, "./merge.json", *(f"./{part}/log.jsonl" for part in ("2-flash", "3-split"))],
}
"""By archive: files that it must hold."""

pytestmark = [
    pytest.mark.slow(105),
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "timeout", "split"))),
        reason="the script needs bash and GNU coreutils",
    ),
]


def script(at: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess[str]:
    places = {
        "DATA": at / "data",
        "RUNS": at / "runs",
        "TEACHER": at / "teacher",
        "WHEELS": at / "no-wheels",
        "PYTHON": sys.executable,
    }
    environment = os.environ | TINY | {k: str(v) for k, v in places.items()} | variables
    return subprocess.run(["bash", SCRIPT, *stages], cwd=at, env=environment, capture_output=True, text=True)


def test_it_is_valid_bash() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_models_are_archived_in_small_files(tmp_path: Path) -> None:
    tiny_stickers.make(tmp_path / "data")
    sd3.save(pocket.build(), tmp_path / "teacher")
    done = script(tmp_path, "data", "vae", "text", "teacher", "t5", "teacher-samples", "student")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "out"
    assert all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())
    steps_of = dict.fromkeys(("vae", "text", "t5-text", "teacher"), 28) | dict.fromkeys(
        ("warm-start", "student"), 4
    )
    for name, steps in steps_of.items():
        whole = tmp_path / f"{name}.tar"
        whole.write_bytes(b"".join(p.read_bytes() for p in sorted(out.glob(f"{name}.tar.*"))))
        with tarfile.open(whole) as tar:
            assert {"./sheet.png", *ARCHIVED[name]} <= set(tar.getnames())
            tar.extractall(tmp_path / "teacher", filter="data")  # over a complete Pocket
        family = sd3.load(tmp_path / "teacher")
        assert family.steps == steps
        assert (family.parts["text_encoder_3"] is None) == (steps == 4)  # students are trained without T5


STUB = """#!/usr/bin/env bash
[ "$3" = ablate ] || exec "$REAL" "$@"
printf '%s\\n' "${@:3}" > "$RUNS/typed"
cd "$RUNS"
mkdir -p ablate/measured ablate/tdm.4.0
touch ablate/results.md ablate/measured/results.json ablate/measured/sheet-a.png ablate/tdm.4.0/cost.json
"""


def test_methods_are_compared_and_the_table_is_archived(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = script(tmp_path, "ablate", PYTHON=str(stub), REAL=sys.executable)
    assert done.returncode == 0, done.stderr
    application().parse_args((tmp_path / "runs/typed").read_text().splitlines())
    with tarfile.open(tmp_path / "runs/out/ablate.tar.aa") as tar:
        names = {"./results.md", "./results.json", "./sheet-a.png", "./tdm.4.0/cost.json"}
        assert names <= set(tar.getnames())


def test_it_stops_when_the_time_is_over(tmp_path: Path) -> None:
    tiny_stickers.make(tmp_path / "data", 3)
    done = script(tmp_path, "data", "teacher", MINUTES="0")
    assert done.returncode == 75
    assert "run the same command again" in done.stderr


def test_an_unknown_stage_is_said(tmp_path: Path) -> None:
    done = script(tmp_path, "techer")
    assert done.returncode == 2
    assert (
        done.stderr
        == "gpu/pocket.sh: there is no stage techer: data, vae, text, teacher, t5, teacher-samples, "
        "student, ablate, export\n"
    )
