#!/usr/bin/env bash
# Makes models/emoji from the font: renders the glyphs, trains the judge and the model, and exports the model. It takes
# ten minutes on one H200.
#
#   tools/train_demo_model.sh [--smoke] [--build DIR] [--out DIR] [--stages "render train"]
#
# --smoke runs every stage on a few glyphs, in a minute or two on a CPU, and writes to DIR/model. It needs what
# tools/emoji/requirements.txt names and Debian's fonts-noto-color-emoji (or FONT=/path/to/NotoColorEmoji.ttf). MINUTES
# limits the time of the training. tools/emoji/quality.py measures the result.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/emoji out="" smoke="" stages="render train"
while (($#)); do
  case $1 in
    --smoke) smoke=1 ;;
    --build) build=$2; shift ;;
    --out) out=$2; shift ;;
    --stages) stages=$2; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
font=${FONT:-/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf}
python=${PYTHON:-python3}
mkdir -p "$build"
# sag_export writes the archives.
export PYTHONPATH=$PWD/exporter${PYTHONPATH:+:$PYTHONPATH}

glyphs=$build/glyphs.npz
judge_options=() train_options=()
if [[ $smoke ]]; then
  out=${out:-$build/model}
  judge_options=(--limit 24 --steps 40 --batch 32)
  train_options=(--limit 24 --steps 6 --batch 4 --report 2)
  [[ ${COMPILE:-} ]] || train_options+=(--no-compile)
fi
out=${out:-models/emoji}
judge_options+=(${MINUTES:+--minutes "$MINUTES"})
train_options+=(${MINUTES:+--minutes "$MINUTES"})

run() { echo "== $1"; "$python" "tools/emoji/$1.py" "${@:2}"; }

for stage in $stages; do
  case $stage in
    render)
      run render --font "$font" --out "$glyphs" ;;
    train)
      # The judge trains while the UNet compiles. Each has a seed and a process of its own, so neither changes the other.
      run judge --glyphs "$glyphs" --out "$build/judge.pt" "${judge_options[@]}" & judge=$!
      run train --glyphs "$glyphs" --out "$build/weights.pt" "${train_options[@]}"
      wait "$judge"
      run export --glyphs "$glyphs" --weights "$build/weights.pt" --out "$out" ;;
    *) echo "unknown stage $stage" >&2; exit 2 ;;
  esac
done
