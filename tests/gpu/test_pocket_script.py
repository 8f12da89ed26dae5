"""``gpu/pocket.sh`` on a CPU with tiny sizes. Left out for their time: its stages ``data`` and ``export``.

In its stage ``ablate`` the command is stood in for: tests/experiments/test_ablate.py runs it.
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
    "CODEC_STEPS": "2",
    "CODEC_BATCH": "2",
    "T5_STEPS": "2",
    "COMPILE": "",
    "WORDS": "20",
    "TEXT_STEPS": "2",
    "TEXT_BATCH": "8",
    "STEPS": "2",
    "BATCH": "4",
    "WALKS": "4",
    "WALK_STEPS": "4",
    "WARM": "1",
    "STUDENT_STEPS": "1",
    "SPLIT": "1",
    "STUDENT_BATCH": "2",
    "DEVICE": "cpu",
}

NET = ("./transformer/diffusion_pytorch_model.safetensors",)
LOGS = ("./log.jsonl", "./run.json")
LEARNT = {
    "text": [
        *LOGS,
        *(f"./{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")),
        *(f"./{part}/tokenizer.json" for part in ("tokenizer", "tokenizer_2")),
    ],
    "t5-text": [*LOGS, "./text_encoder_3/model.safetensors"],
    "codec": [*LOGS, "./vae/diffusion_pytorch_model.safetensors"],
    "teacher": [*LOGS, *NET],
    "warm": [*LOGS, *NET],
    "student": [*NET, "./merge.json", *(f"./{part}/log.jsonl" for part in ("2-flash", "3-split"))],
}
"""What each archive must hold."""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout", "split"))), reason="the script needs bash and GNU coreutils"
)


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


def test_what_was_learnt_comes_home_in_small_files(tmp_path: Path) -> None:
    tiny_stickers.make(tmp_path / "data")
    sd3.save(pocket.build(), tmp_path / "teacher")
    done = script(tmp_path, "data", "codec", "text", "teacher", "t5", "walks", "student")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "out"
    assert all(path.stat().st_size < 16 * 2**20 for path in out.iterdir())
    steps_of = dict.fromkeys(("codec", "text", "t5-text", "teacher"), 28) | dict.fromkeys(
        ("warm", "student"), 4
    )
    for name, steps in steps_of.items():
        whole = tmp_path / f"{name}.tar"
        whole.write_bytes(b"".join(p.read_bytes() for p in sorted(out.glob(f"{name}.tar.*"))))
        with tarfile.open(whole) as tar:
            assert {"./sheet.png", *LEARNT[name]} <= set(tar.getnames())
            tar.extractall(tmp_path / "teacher", filter="data")  # over a complete Pocket
        family = sd3.load(tmp_path / "teacher")
        assert family.steps == steps
        assert (family.parts["text_encoder_3"] is None) == (steps == 4)  # students learnt to do without T5


STAND_IN = """#!/usr/bin/env bash
[ "$3" = ablate ] || exec "$REAL" "$@"
printf '%s\\n' "${@:3}" > "$RUNS/typed"
cd "$RUNS"
mkdir -p ablate/measured ablate/tdm.4.0
touch ablate/results.md ablate/measured/results.json ablate/measured/sheet-a.png ablate/tdm.4.0/cost.json
"""


def test_all_methods_are_compared_and_the_table_comes_home(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    done = script(tmp_path, "ablate", PYTHON=str(stand_in), REAL=sys.executable)
    assert done.returncode == 0, done.stderr
    application().parse_args((tmp_path / "runs/typed").read_text().splitlines())
    with tarfile.open(tmp_path / "runs/out/ablate.tar.aa") as tar:
        names = {"./results.md", "./results.json", "./sheet-a.png", "./tdm.4.0/cost.json"}
        assert names <= set(tar.getnames())


def test_it_says_when_the_time_is_up(tmp_path: Path) -> None:
    tiny_stickers.make(tmp_path / "data", 3)
    done = script(tmp_path, "data", "teacher", MINUTES="0")
    assert done.returncode == 75
    assert "run the same command again" in done.stderr


def test_an_unknown_stage_is_said(tmp_path: Path) -> None:
    done = script(tmp_path, "techer")
    assert done.returncode == 2
    assert (
        done.stderr
        == "gpu/pocket.sh: there is no stage techer: data, codec, text, teacher, t5, walks, student, "
        "ablate, export\n"
    )
